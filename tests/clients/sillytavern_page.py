"""What a person does in SillyTavern's page, in a real browser: connect, talk, continue, swipe, write as the user."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from cases import KEY, META

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
PATIENCE = 60_000  # milliseconds
# What is begun in the instant after a reply or a command SillyTavern drops: "Cannot read properties of null (reading
# 'generate')".
TIDYING_UP = 1500  # milliseconds
DOCUMENT = Path(__file__).parents[2] / "docs" / "clients.md"
WITHOUT_NAMES = "只用中文回答。"  # a main prompt that does not say who talks to whom
EXAMPLES = "[旅人]你叫什么？\n[阿青]阿青。\n[旅人]冷吗？\n[阿青]*摇头* 习惯了。\n[阿青]*抬头* 什么人？\n"
SET = """(field, value) => {
    field.value = value;
    for (const kind of ['input', 'change', 'blur']) field.dispatchEvent(new Event(kind, { bubbles: true }));
}"""


class Page:
    """SillyTavern's page; `prompts` are those that our server makes."""

    def __init__(self, page, address: str, url: str, prompts: list[str]):
        self.page, self.prompts = page, prompts
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        self.fill(".popup-input >> visible=true", META["user_name"])
        page.locator(".popup-button-ok >> visible=true").click()
        self.connect(url)
        self.press(f".character_select:has-text('{META['bot_name']}')")
        page.locator("#chat .mes_text", has_text="什么人").wait_for()

    def fill(self, field: str, text: str) -> None:
        """Also where a closed drawer hides the field."""
        self.page.locator(field).first.evaluate(SET, text)

    def press(self, button: str) -> None:
        self.page.locator(button).first.dispatch_event("click")

    def connect(self, url: str) -> None:
        self.fill("#main_api", "openai")
        self.fill("#chat_completion_source", "custom")
        self.fill("#custom_api_url_text", url)
        self.fill("#custom_model_id", "characterglm")
        self.fill("#api_key_custom", KEY)
        self.press("#api_button_openai")
        self.page.locator("#send_textarea[placeholder^='Type a message']").wait_for()

    def include_in_body(self, block: str) -> None:
        self.press("#customize_additional_parameters")
        self.page.locator("#custom_include_body >> visible=true").fill(block)
        self.page.locator(".popup-button-ok >> visible=true").click()

    def writes(self, begin: Callable[[], None]) -> str:
        """The prompt of the reply that `begin` asks for, once that has been written."""
        number = len(self.prompts)
        begin()
        for _ in range(PATIENCE // 100):
            self.page.wait_for_timeout(100)
            if len(self.prompts) > number and not self.page.locator("body[data-generating]").count():
                self.page.wait_for_timeout(TIDYING_UP)
                return self.prompts[-1]
        raise RuntimeError(f"no reply: {self.toasts()}")

    def send(self, text: str) -> None:
        self.fill("#send_textarea", text)
        self.press("#send_but")

    def say(self, text: str) -> str:
        return self.writes(lambda: self.send(text))

    def last(self) -> str:
        return self.page.locator("#chat .mes").last.locator(".mes_text").inner_text().strip()

    def toasts(self) -> str:
        return " ".join(self.page.locator(".toast-message").all_inner_texts())


# --- what is tried, each with the page as the one before left it -----------------------------------------------------


def names_from_its_own_words(page: Page):
    prompt = page.say("你好")
    assert page.last(), "an empty reply"
    start = f"以下是一段阿青和旅人之间的对话。\n关于阿青的信息：{META['bot_info']}\n"
    return prompt == f"{start}{EXAMPLES}[旅人]你好\n[阿青]" or prompt


def include_body_parameters(page: Page):
    """The block of docs/clients.md, as it stands there, where the request says nothing else about names."""
    page.fill("#main_prompt_quick_edit_textarea", WITHOUT_NAMES)
    without = page.say("再见")
    assert without.startswith("以下是一段角色和用户之间的对话"), without
    page.include_in_body(re.search(r"```yaml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)[1])
    prompt = page.say("别走")
    return prompt.startswith("以下是一段阿青和旅人之间的对话") and prompt.endswith("[旅人]别走\n[阿青]") or prompt


def swipe(page: Page):
    before = page.prompts[-1]
    prompt = page.writes(lambda: page.press("#chat .mes.last_mes .swipe_right"))
    return prompt == before or prompt


def continue_last_message(page: Page):
    text = page.last()
    prompt = page.writes(lambda: page.press("#option_continue"))
    assert page.last().startswith(text), (text, page.last())
    return prompt.endswith(f"[旅人]别走\n[阿青]{text}") or prompt


def impersonate(page: Page):
    """What the user could say stands where the user writes."""
    prompt = page.writes(lambda: page.press("#option_impersonate"))
    page.page.wait_for_function("document.querySelector('#send_textarea').value")
    page.fill("#send_textarea", "")
    return prompt.endswith("\n[旅人]") or prompt


def narrator(page: Page):
    page.send("/sys 门开了。")
    page.page.locator("#chat .mes_text", has_text="门开了").wait_for()
    page.page.wait_for_timeout(TIDYING_UP)
    prompt = page.say("谁？")
    return prompt.endswith("\n[旅人]（门开了。）谁？\n[阿青]") or prompt


def two_swipes(page: Page):
    """Multiple swipes per generation, which is `n`."""
    page.fill("#n_openai", "2")
    page.say("讲个故事")
    counter = page.page.locator("#chat .mes.last_mes .swipes-counter").inner_text()
    return bool(re.fullmatch(r"1\W*/\W*2", counter.replace("\u200b", ""))) or counter


def error_message(page: Page):
    """What the page shows of an error."""
    page.fill("#custom_model_id", "gpt-4")
    page.send("在吗")
    page.page.locator(".toast-message", has_text="model not found").wait_for(timeout=20_000)
    return True


TRIED = [
    *(names_from_its_own_words, include_body_parameters, swipe, continue_last_message),
    *(impersonate, narrator, two_swipes, error_message),
]


def attempt(tried: Callable, page: Page):
    try:
        return tried(page)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:400]}"


def run(address: str, url: str, prompts: list[str]) -> dict:
    """True or what was wrong, for each thing tried."""
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        return {"page": "— 没有 Chromium 或 Chrome [no browser found]"}
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=OPTIONS)
        try:
            page = Page(browser.new_page(viewport={"width": 1280, "height": 1000}), address, url, prompts)
            return {f"page: {tried.__name__.replace('_', ' ')}": attempt(tried, page) for tried in TRIED}
        finally:
            browser.close()
