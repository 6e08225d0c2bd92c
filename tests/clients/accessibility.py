"""axe-core (npm) on the chat page in both languages, themes and sizes: python tests/clients/accessibility.py

Prints what it finds and ends with 1 if anything is serious.
"""

import shutil
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from playwright.sync_api import Page, sync_playwright  # noqa: E402
from sillytavern_page import BROWSERS, OPTIONS  # noqa: E402

import helpers  # noqa: E402
from helpers.demo.web import launch  # noqa: E402

AXE = "axe-core@4.14.1"
SIZES = ((1200, 800), (390, 844))
FADING = 800  # milliseconds: what opens or is enabled fades in
FIND = """async () => (await axe.run(document, {resultTypes: ["violations"]})).violations.map(
  (found) => [found.impact, found.id, found.nodes.map((node) => node.html.slice(0, 120))])"""


def get_axe() -> str:
    """The source of axe-core."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", AXE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(folder).glob("*.tgz")
        shutil.unpack_archive(archive, folder, filter="data")
        return (Path(folder) / "package" / "axe.min.js").read_text(encoding="utf-8")


def visit(page: Page, axe: str):
    """Go through the page; yields a name wherever there is something to look at."""
    card = page.locator('#gallery .cg-card[data-at="孙悟空"]').last
    card.wait_for(timeout=60_000)
    page.evaluate(axe)
    yield "gallery"
    card.click()
    page.locator("#log .cg-message").first.wait_for()
    page.locator("#box textarea").fill("你好呀")
    page.locator("#box textarea").press("Enter")
    page.locator('#log [data-do="regenerate"]').wait_for(timeout=60_000)
    page.wait_for_timeout(FADING)
    yield "talk"
    page.locator(".sidebar .toggle-button").click()
    for part in ("persona", "parameters", "files", "duet"):
        page.locator(f"#{part} button").first.click()
    page.wait_for_timeout(FADING)
    yield "drawer"


def main() -> int:
    axe, model, serious = get_axe(), helpers.load("nano", dtype="float32", device_map="cpu"), 0
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=OPTIONS)
        for language in ("zh", "en"):
            with launch(*model, port=0, language=language) as demo:
                for theme, (width, height) in product(("light", "dark"), SIZES):
                    viewport = {"width": width, "height": height}
                    page = chromium.new_page(color_scheme=theme, viewport=viewport)
                    page.goto(demo.url)
                    for place in visit(page, axe):
                        for impact, rule, nodes in page.evaluate(FIND):
                            print(f"{language} {theme} {width} {place}: {impact} {rule}", *nodes, sep="\n    ")
                            serious += impact in ("serious", "critical")
                    page.close()
        chromium.close()
    print(f"{AXE}: {serious} serious")
    return int(serious > 0)


if __name__ == "__main__":
    sys.exit(main())
