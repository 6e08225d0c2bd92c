"""Notebook 01 in JupyterLab, stepped through by a real browser as a reader would."""

import os
from pathlib import Path

import pytest
from conftest import saved_outputs

pytestmark = [pytest.mark.browser, pytest.mark.slow]

NOTEBOOK = "01_transformers_deploy.ipynb"
IDLE = ".jp-Notebook-ExecutionIndicator[data-status=idle]"


def open_notebook(page, lab: str, name: str) -> None:
    """Open a notebook and wait until its kernel is there."""
    page.goto(f"{lab}/lab/workspaces/test/tree/notebooks/{name}?reset")
    page.wait_for_selector(".jp-Notebook")
    page.wait_for_selector(IDLE, timeout=90_000)


def use_nano(page) -> None:
    """Set MODEL in the parameters cell, as a reader types it."""
    cell = page.locator(".jp-CodeCell .cm-content").first
    cell.click()
    page.keyboard.press("Control+Home")
    page.keyboard.press("End")
    page.keyboard.press("Shift+Home")
    page.keyboard.insert_text('MODEL = "nano"  # typed by the test')  # as pasted: no quotes are added


def run_all(page) -> None:
    """Run all cells and wait for the last one."""
    page.click("text=Run >> nth=0")
    page.click("text=Run All Cells")
    page.wait_for_function(
        "() => document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'busy'", timeout=60_000
    )
    page.wait_for_selector(IDLE, timeout=400_000)


def scroll_through(page) -> None:
    """JupyterLab draws what is in view: walk down once so that everything has been drawn."""
    panel = page.locator(".jp-WindowedPanel-outer, .jp-Notebook").first
    for _ in range(40):
        panel.evaluate("element => element.scrollBy(0, 800)")
        page.wait_for_timeout(60)


def keep_screenshots(page) -> None:
    """Write pictures of what was seen into $SCREENSHOTS, if that is set."""
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for position, heading in enumerate(page.locator(".jp-MarkdownCell h2").all()):
            heading.scroll_into_view_if_needed()
            page.wait_for_timeout(300)
            page.screenshot(path=f"{folder}/lab_{position:02d}.png")


def test_notebook_01_runs_in_jupyterlab(lab, page):
    open_notebook(page, lab, NOTEBOOK)
    use_nano(page)
    run_all(page)
    scroll_through(page)
    keep_screenshots(page)
    outputs = saved_outputs(page, lab, NOTEBOOK, last="练习 4）")
    assert "全部通过" in outputs and "receipt_01.json" in outputs
    assert "[陆星辰] 你好呀，小苏" in outputs
    assert not page.outside_requests, page.outside_requests
    assert not page.console_errors, page.console_errors
    assert page.get_by_text("Jupyter news").count() == 0, "nothing pops up"


def test_prompt_xray_escapes_what_the_user_writes(page):
    import helpers

    _, tokenizer = helpers.load("nano")
    attack = '<img src="http://example.invalid/x.png" onerror="window.hit=1"><script>window.hit=1</script>'
    card = helpers.SessionMeta(bot_name="<b>名</b>", user_name="甲")
    xray = helpers.prompt_xray(tokenizer, card, [{"role": "user", "content": attack}])
    page.set_content(f"<body>{xray._repr_html_()}</body>")
    page.wait_for_timeout(300)
    assert page.evaluate("window.hit") is None
    assert page.locator("img, script").count() == 0
    assert not page.outside_requests
