"""A JupyterLab on 127.0.0.1 with a copy of the notebooks, and a page of a real browser."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

PROJECT_DIR = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Without these Chromium talks to its maker's servers from the start.
CHROMIUM_OPTIONS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
PATIENCE = 30  # seconds until what must appear counts as missing: a busy machine takes many times its usual time


def find_browser() -> str:
    """The browser's path; the test is skipped where there is none."""
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    pytest.skip("没有 Chromium 或 Chrome [no browser found]：apt-get install chromium fonts-noto-cjk")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until_up(url: str, process: subprocess.Popen, seconds: float = 90) -> None:
    """Return when `url` answers; fail if the process ends or the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "JupyterLab ended"
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"JupyterLab did not answer within {seconds} s")


@pytest.fixture
def lab(tmp_path: Path):
    """Address of a JupyterLab whose folder holds copies of the notebooks."""
    find_browser()
    copy_notebooks(tmp_path / "notebooks")
    with running_lab(tmp_path) as address:
        yield address


def copy_notebooks(folder: Path) -> None:
    """Copies of the notebooks without their outputs: what a test finds there, its own run has made."""
    folder.mkdir()
    for file in (PROJECT_DIR / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(file, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, folder / file.name)


@contextmanager
def running_lab(folder: Path):
    """A JupyterLab that serves `folder` and keeps its settings there; yields its address."""
    port = free_port()
    environment = {name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")}
    environment |= {"IPYTHONDIR": str(folder / "ipython"), "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}
    environment["JUPYTER_CONFIG_PATH"] = str(PROJECT_DIR / "scripts" / "jupyter")  # as `make lab`
    options = ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.open_browser=False"]
    options += ["--IdentityProvider.token=", "--allow-root", "--ServerApp.port_retries=0"]
    with (folder / "lab.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            cwd=folder,
            env={**os.environ, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until_up(f"http://127.0.0.1:{port}/api", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=30)


def saved_outputs(page, address: str, notebook: str, last: str) -> str:
    """Save the open notebook; all its outputs as JSON text, once the file has `last` in them.

    Errors of cells fail the test. `last` is what the last cell prints: the indicator says idle between two cells too.
    """
    deadline = time.monotonic() + 2 * PATIENCE
    while True:
        page.keyboard.press("Control+s")
        page.wait_for_timeout(1000)
        content = page.request.get(f"{address}/api/contents/notebooks/{notebook}").json()["content"]
        outputs = [output for cell in content["cells"] for output in cell.get("outputs", [])]
        assert not [output["evalue"] for output in outputs if output["output_type"] == "error"]
        text = json.dumps(outputs, ensure_ascii=False)
        if last in text or time.monotonic() > deadline:
            return text


def write_setting(folder: Path, plugin: str, values: dict) -> None:
    """Write a JupyterLab user setting."""
    package, name = plugin.rsplit(":", 1)
    file = folder / package / f"{name}.jupyterlab-settings"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values))


@pytest.fixture(scope="module")
def browser():
    """A real browser. Not for the whole session: while Playwright runs, no test of that thread can use asyncio."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page of a real browser that notes requests to other machines and errors on its console."""
    with new_page(browser) as page:
        yield page


@contextmanager
def new_page(browser):
    """What the fixture `page` is, for as long as the caller wants it."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.outside_requests, page.console_errors = [], []
    page.on("request", lambda request: _note_outside(page, request.url))
    page.on("console", lambda message: _note_error(page, message))
    yield page
    page.close()


def _note_outside(page, url: str) -> None:
    if not re.match(r"((https?|wss?)://127\.0\.0\.1[:/]|data:|blob:)", url):
        page.outside_requests.append(url)


def _note_error(page, message) -> None:
    if message.type == "error":
        page.console_errors.append(message.text)
