"""The API's documentation page in a real browser: it works with no other machine to ask, and tries requests out."""

import os
from pathlib import Path

import pytest
from playwright.sync_api import expect

from helpers.serving import Server

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log_file = tmp_path_factory.mktemp("server") / "log"
    with Server("nano", port=20000 + os.getpid() % 20000, log_file=log_file, api_key="sk-docs") as running:
        yield running


def test_docs_without_the_internet(server, page):
    page.goto(f"{server.url}/docs")
    expect(page.locator(".opblock")).to_have_count(6)
    page.locator("button.authorize").click()
    page.locator(".auth-container input").fill("sk-docs")
    page.locator(".auth-container button[type=submit]").click()
    page.locator(".btn-done").click()
    block = page.locator("#operations-default-lesson__post")
    block.locator(".opblock-summary-control").click()
    block.locator(".try-out__btn").click()
    block.locator(".execute").click()
    answer = block.locator(".live-responses-table tbody .response-col_status")
    expect(answer).to_contain_text("200", timeout=15_000)
    expect(block.locator(".live-responses-table .highlight-code").first).to_contain_text('"response"')
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{folder}/api_docs.png", full_page=True)
    assert not page.outside_requests, page.outside_requests
    assert not page.console_errors, page.console_errors
