"""The chat panel in JupyterLab and a real browser, on a CharacterGLM-Nano that is slowed down so that it can be watched."""

import json
import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from conftest import copy_notebooks, find_browser, new_page, running_lab, saved_outputs, write_setting
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import expect
from test_lab import IDLE, open_notebook, run_all, scroll_through, use_nano

import helpers

pytestmark = pytest.mark.browser  # one test here is fast; the others are for `make test-slow`

THEMES = "@jupyterlab/apputils-extension:themes"
ATTACK = "<img src=http://example.invalid/x.png onerror=window.hit=1>"
SETUP = """\
import time
import helpers
from helpers.demo.notebook import ChatPanel
model, tokenizer = helpers.load("nano", dtype="float32", device_map="cpu")
slow = model.register_forward_pre_hook(lambda *inputs: time.sleep(0.04))
panel = ChatPanel(model, tokenizer, min_new_tokens=15, max_new_tokens=40)
panel
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Address of a JupyterLab with a notebook that shows the panel."""
    find_browser()
    folder = tmp_path_factory.mktemp("lab")
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    for name in ("chat", "dark", "narrow"):
        nbformat.write(
            new_notebook(cells=[new_code_cell(SETUP)], metadata={"kernelspec": kernel}), folder / f"{name}.ipynb"
        )
    with running_lab(folder) as address:
        yield address, folder


@pytest.fixture(scope="module")
def panel(lab, browser):
    """The page with the panel; every test begins and ends with no reply being written."""
    with new_page(browser) as page:
        show_panel(page, lab[0], "chat")
        yield page


@pytest.fixture(autouse=True)
def nothing_went_wrong(request):
    """No test lets the page ask another machine for something, log an error or run what somebody wrote."""
    yield
    if "panel" in request.fixturenames:
        page = request.getfixturevalue("panel")
        assert page.outside_requests == []
        assert page.console_errors == []
        assert page.evaluate("window.hit") is None


def show_panel(page, address: str, name: str) -> None:
    """Open a notebook and run its cell."""
    page.goto(f"{address}/lab/workspaces/test/tree/{name}.ipynb?reset")
    page.wait_for_selector(IDLE, timeout=90_000)
    page.locator(".jp-CodeCell .cm-content").first.click()
    while not page.locator(".jp-InputPrompt", has_text=re.compile(r"\[[*\d]")).count():
        page.keyboard.press("Control+Enter")  # a kernel that is just starting may miss the first one
        page.wait_for_timeout(1000)
    page.wait_for_selector(".cg-log", timeout=90_000)


def button(page, name: str):
    return page.locator(".jupyter-button", has_text=name)


def field(page):
    return page.get_by_placeholder("说点什么")


def say(page, text: str) -> None:
    """Type and press Enter; the reply is on its way when this returns."""
    field(page).fill(text)
    field(page).press("Enter")
    expect(button(page, "停止")).to_be_enabled()


def wait_for_reply(page) -> None:
    expect(button(page, "停止")).to_be_disabled(timeout=30_000)
    expect(button(page, "发送")).to_be_enabled()


def messages(page) -> list[str]:
    """The texts in the log, oldest first, without names."""
    return [text.partition("\n")[2].strip() for text in page.locator(".cg-message").all_inner_texts()][::-1]


def begin_anew(page) -> None:
    page.wait_for_timeout(600)  # a second click within half a second would be taken for a double click
    button(page, "清空").click()
    expect(page.locator(".cg-message")).to_have_count(1)


def open_section(page, name: str):
    header = page.locator(".jupyter-widget-Collapse-header", has_text=name)
    if not page.locator(".jupyter-widget-Collapse-open", has_text=name).count():
        header.click()
    return header.locator("xpath=..")


def upload(page, file: Path) -> None:
    open_section(page, "导入")
    with page.expect_file_chooser() as chooser:
        button(page, "导入").click()
    chooser.value.set_files(file)


def test_reply_grows_and_can_be_stopped(panel):
    begin_anew(panel)
    say(panel, "讲讲你最近的新歌吧")
    lengths = set()
    while len(lengths) < 4:  # the greeting, the question, and the reply in at least two lengths
        lengths.add(sum(map(len, messages(panel))))
        panel.wait_for_timeout(20)
    button(panel, "停止").click()
    wait_for_reply(panel)
    stopped = messages(panel)
    assert stopped[1] == "讲讲你最近的新歌吧"
    assert "▌" not in stopped[2]
    panel.wait_for_timeout(500)
    assert messages(panel) == stopped, "nothing is written after a stop"
    assert field(panel).input_value() == ""


@pytest.mark.slow
def test_fast_typing_arrives_whole(panel):
    begin_anew(panel)
    text = "你好呀，" * 8
    field(panel).click()
    panel.keyboard.type(text)
    panel.keyboard.press("Enter")
    expect(button(panel, "停止")).to_be_enabled()
    wait_for_reply(panel)
    assert messages(panel)[1] == text


@pytest.mark.slow
def test_regenerate_swipe_undo_and_edit(panel):
    begin_anew(panel)
    say(panel, "你好呀")
    wait_for_reply(panel)
    first = messages(panel)[2]
    button(panel, "重说").dblclick()
    expect(button(panel, "停止")).to_be_enabled()
    wait_for_reply(panel)
    expect(panel.get_by_text("2/2", exact=True)).to_be_visible()
    second = messages(panel)[2]
    button(panel, "‹").click()
    expect(panel.get_by_text("1/2", exact=True)).to_be_visible()
    assert messages(panel)[2] == first
    button(panel, "›").click()
    expect(panel.get_by_text("2/2", exact=True)).to_be_visible()
    assert messages(panel)[2] == second

    button(panel, "编辑").click()
    panel.get_by_label("你的话").fill("早上好")
    panel.get_by_label("回复").fill(f"早！{ATTACK}")
    button(panel, "保存").click()
    expect(panel.get_by_label("回复")).to_be_hidden()
    assert messages(panel)[1:] == ["早上好", f"早！{ATTACK}"]

    button(panel, "撤回").dblclick()
    expect(panel.locator(".cg-message")).to_have_count(1)
    expect(field(panel)).to_have_value("早上好")
    button(panel, "发送").click()
    expect(button(panel, "停止")).to_be_enabled()
    wait_for_reply(panel)
    assert messages(panel)[1] == "早上好"


@pytest.mark.slow
def test_what_is_written_is_not_run(panel):
    begin_anew(panel)
    say(panel, ATTACK)
    wait_for_reply(panel)
    assert messages(panel)[1] == ATTACK
    assert panel.locator(".jp-OutputArea img").count() == 0


@pytest.mark.slow
def test_each_character_keeps_its_conversation(panel):
    begin_anew(panel)
    say(panel, "你好呀")
    wait_for_reply(panel)
    before = messages(panel)
    panel.get_by_label("角色", exact=True).select_option("林黛玉")
    expect(panel.locator(".cg-message")).to_have_count(1)
    assert messages(panel) == [helpers.get_character("林黛玉").greeting]
    panel.get_by_label("角色", exact=True).select_option("苏梦远")
    expect(panel.locator(".cg-message")).to_have_count(3)
    assert messages(panel) == before


@pytest.mark.slow
def test_persona_is_checked_and_applied(panel):
    begin_anew(panel)
    open_section(panel, "人设")
    panel.get_by_label("角色名").fill(" ")
    button(panel, "应用人设").click()
    expect(panel.get_by_role("alert")).to_contain_text("invalid persona")
    panel.get_by_label("角色名").fill("苏老师")
    panel.get_by_label("开场白").fill(f"上课了 {ATTACK}")
    button(panel, "应用人设").click()
    expect(panel.locator(".cg-name")).to_have_text("苏老师")
    assert messages(panel) == [f"上课了 {ATTACK}"]
    expect(panel.get_by_role("alert")).to_be_hidden()


@pytest.mark.slow
def test_export_and_import(panel, tmp_path):
    begin_anew(panel)
    say(panel, "你好呀")
    wait_for_reply(panel)
    before = messages(panel)
    open_section(panel, "导入")
    button(panel, "导出").click()
    expect(panel.locator(".cg-links a")).to_have_count(4)
    files = {}
    for link in panel.locator(".cg-links a").all():
        with panel.expect_download() as download:
            link.click()
        files[Path(download.value.suggested_filename).suffix] = tmp_path / download.value.suggested_filename
        download.value.save_as(tmp_path / download.value.suggested_filename)
    chat_file = next(path for path in tmp_path.iterdir() if path.suffix == ".json" and "card" not in path.name)
    exported = json.loads(chat_file.read_text(encoding="utf-8"))
    assert [text for entry in exported["history"] for text in entry if text] == before
    assert files[".md"].read_text(encoding="utf-8").count("**：") == 3

    begin_anew(panel)
    upload(panel, chat_file)
    expect(panel.locator(".cg-message")).to_have_count(3)
    assert messages(panel) == before
    upload(panel, files[".png"])
    expect(panel.locator(".cg-message")).to_have_count(1)
    upload(panel, files[".md"])
    expect(panel.get_by_role("alert")).to_contain_text("invalid JSON")
    panel.get_by_label("角色", exact=True).select_option("苏梦远")


@pytest.mark.slow
def test_parameters_moved_while_a_reply_is_written(panel):
    begin_anew(panel)
    open_section(panel, "参数")
    slider = panel.locator(".widget-slider", has_text="temperature")
    say(panel, "讲个故事吧")
    slider.locator(".noUi-handle").press("ArrowRight")
    wait_for_reply(panel)
    assert len(messages(panel)) == 3
    expect(slider.locator(".widget-readout")).to_have_text("0.40")


@pytest.mark.slow
def test_reload_and_second_view_lose_nothing(panel):
    """The panel lives in the kernel: the reader runs a cell and has the same conversation again."""
    begin_anew(panel)
    say(panel, "你好呀")
    wait_for_reply(panel)
    before = messages(panel)
    panel.keyboard.press("Control+s")
    panel.wait_for_timeout(1000)
    panel.goto(panel.url.split("?")[0])
    panel.wait_for_selector(IDLE, timeout=90_000)
    panel.locator(".jp-CodeCell .cm-content").first.click()
    panel.keyboard.press("Control+a")
    panel.keyboard.insert_text("from IPython.display import display\ndisplay(panel, panel)")
    panel.keyboard.press("Control+Enter")
    expect(panel.locator(".cg-log")).to_have_count(2, timeout=30_000)
    expect(panel.locator(".cg-message")).to_have_count(6)
    assert messages(panel) == [*before, *before]
    field(panel).nth(1).fill("还在吗")
    field(panel).nth(1).press("Enter")
    expect(panel.locator(".cg-message")).to_have_count(10)
    expect(button(panel, "停止").first).to_be_disabled(timeout=30_000)


@pytest.mark.slow
@pytest.mark.parametrize("name, theme, width", [("dark", "JupyterLab Dark", 1280), ("narrow", "JupyterLab Light", 520)])
def test_looks_right_in_the_dark_and_in_a_narrow_window(lab, page, name, theme, width):
    address, folder = lab
    write_setting(folder / "settings", THEMES, {"theme": theme})
    show_panel(page, address, name)
    page.keyboard.press("Control+b")  # closes the list of files
    page.set_viewport_size({"width": width, "height": 1000})
    say(page, "你好呀，最近在忙些什么")
    wait_for_reply(page)
    log = page.locator(".cg-log").bounding_box()
    for part in (field(page), *button(page, "").all()):
        if part.is_visible() and (box := part.bounding_box()):
            assert log["x"] - 2 <= box["x"] and box["x"] + box["width"] <= log["x"] + log["width"] + 2
    assert contrast(page, ".cg-bot") > 4.5 and contrast(page, ".cg-user") > 4.5
    keep_screenshot(page, name)


def keep_screenshot(page, name: str) -> None:
    """Write a picture of what is seen into $SCREENSHOTS, if that is set."""
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{folder}/panel_{name}.png")


def contrast(page, selector: str) -> float:
    """The WCAG contrast ratio of text and background of the first match (4.5 is what small text needs)."""
    colours = page.locator(selector).first.evaluate(
        """element => {
            const canvas = document.createElement("canvas").getContext("2d");
            const luminance = colour => {
                canvas.fillStyle = colour;
                canvas.fillRect(0, 0, 1, 1);
                const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(
                    v => v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const style = getComputedStyle(element);
            return [luminance(style.backgroundColor), luminance(style.color)];  // text is drawn over its background
        }"""
    )
    return (max(colours) + 0.05) / (min(colours) + 0.05)


@pytest.mark.slow
def test_notebook_03_runs_in_jupyterlab(tmp_path, page):
    """Its last cells close the panel, so what the panel said is read from the text beside it."""
    copy_notebooks(tmp_path / "notebooks")
    shutil.copytree(Path(__file__).parents[2] / "docs", tmp_path / "docs")  # its pictures
    with running_lab(tmp_path) as address:
        open_notebook(page, address, "03_chat_demo.ipynb")
        use_nano(page)
        run_all(page)
        scroll_through(page)
        keep_screenshot(page, "notebook03")
        outputs = saved_outputs(page, address, "03_chat_demo.ipynb", last="receipt_03.json")
    assert "全部通过" in outputs and "receipt_03.json" in outputs
    assert "[陆星辰] 最近在忙些什么" in outputs
    assert not page.outside_requests and not page.console_errors
