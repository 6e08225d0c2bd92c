"""The web page in a real browser, on CharacterGLM-Nano, as a visitor would use it."""

import base64
import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import expect

import helpers
from helpers.demo.texts import label
from helpers.demo.web import launch

pytestmark = pytest.mark.browser  # one test here is fast; the others are for `make test-slow`

LONG = {"do_sample": False, "min_new_tokens": 40, "max_new_tokens": 40, "repetition_penalty": 1.3}
ATTACK = '<img src="http://example.invalid/x.png" onerror="window.hit=1"><script>window.hit=1</script>'


@pytest.fixture(scope="module")
def nano():
    return helpers.load("nano", dtype="float32", device_map="cpu")


@pytest.fixture(scope="module")
def url(nano):
    """The page with replies of 40 tokens, each of which takes at least 0.08 s."""
    handle = nano[0].register_forward_pre_hook(lambda *_: time.sleep(0.08))
    with launch(*nano, port=0, **LONG) as demo:
        yield demo.url
    handle.remove()


@pytest.fixture
def chat(page, url):
    """The page, open; afterwards it must not have asked another machine for anything, nor complained."""
    open_page(page, url)
    yield page
    assert page.outside_requests == []
    assert page.console_errors == []


def open_page(page, url):
    page.goto(url)
    card(page, "苏梦远").click(timeout=60_000)
    expect(page.locator("#log .cg-message").first).to_be_visible()


def card(page, name):
    """The character in the gallery."""
    return page.locator(f'#gallery .cg-card[data-at="{name}"]').last


def tool(page, name):
    """A button of the last message that has it."""
    return page.locator(f'#log [data-do="{name}"]').last


def settings(page, part):
    """Open the drawer, and this part of it, unless they are."""
    if page.locator(".sidebar.open").count() == 0:
        page.locator(".sidebar .toggle-button").click()
    expect(page.locator(f"#{part}")).to_be_visible()
    button = page.locator(f"#{part} > button, #{part} button.label-wrap").first
    if "open" not in (button.get_attribute("class") or "").split():
        button.click()


def ready(page):
    """Wait until no reply is being written."""
    expect(page.locator("#send")).to_be_enabled(timeout=60_000)
    expect(page.locator("#draft .cg-message")).to_have_count(0)


def reload(page):
    page.reload()
    expect(page.locator("#log .cg-message").first).to_be_visible(timeout=60_000)
    # Gradio's client complains of the connections that it closes itself when its page is left.
    closed = ("AbortError", "Connection errored out")
    page.console_errors[:] = [error for error in page.console_errors if not any(text in error for text in closed)]


def say(page, text):
    box(page).fill(text)
    box(page).press("Enter")
    expect(page.locator("#draft .cg-bot")).to_be_visible()


def box(page, name="box"):
    return page.locator(f"#{name} textarea, #{name} input").first


def texts(page):
    """The messages of the conversation, without the names above them."""
    return [text.split("\n", 1)[1] for text in page.locator("#log .cg-message").all_inner_texts()]


def keep_screenshot(page, name):
    """Write a picture of what is seen into $SCREENSHOTS, if that is set."""
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{folder}/web_{name}.png")


@contextmanager
def second_tab(page):
    with page.expect_popup() as popup:
        page.evaluate("window.open(location.href)")
    expect(popup.value.locator("#log .cg-message").first).to_be_visible(timeout=60_000)
    yield popup.value
    popup.value.close()


def test_reply_is_seen_growing(chat):
    say(chat, "讲个故事")
    drafts = []
    while chat.locator("#draft .cg-bot").count():
        drafts += chat.locator("#draft .cg-bot").all_inner_texts()
        chat.wait_for_timeout(60)
    ready(chat)
    grown = [text.removeprefix("苏梦远\n").removesuffix(" ▌") for text in drafts]
    greeting, query, reply = texts(chat)
    assert query == "讲个故事"
    assert len(set(grown)) > 5 and all(reply.startswith(text) for text in grown)
    assert box(chat).input_value() == ""
    expect(chat.locator("#meter")).to_contain_text("之后每秒")


@pytest.mark.slow
def test_stop_regenerate_swipe_undo(chat):
    say(chat, "讲个故事")
    chat.wait_for_timeout(500)
    chat.locator("#stop").click()
    ready(chat)
    cut = texts(chat)[-1]
    chat.wait_for_timeout(700)
    assert texts(chat)[-1] == cut
    tool(chat, "regenerate").click()
    expect(chat.locator("#draft .cg-bot")).to_be_visible()
    ready(chat)
    whole = texts(chat)[-1]
    assert whole.startswith(cut) and len(whole) > len(cut)
    expect(chat.locator("#position")).to_have_text("2/2")
    tool(chat, "previous").click()
    expect(chat.locator("#position")).to_have_text("1/2")
    assert texts(chat)[-1] == cut
    tool(chat, "next").click()
    expect(chat.locator("#position")).to_have_text("2/2")
    assert texts(chat)[-1] == whole
    chat.locator("#undo").dblclick()
    expect(box(chat)).to_have_value("讲个故事")
    assert len(texts(chat)) == 1
    expect(chat.locator("#problem")).to_be_hidden()


@pytest.mark.slow
def test_double_click_sends_once(chat):
    box(chat).fill("你好")
    chat.locator("#send").dblclick()
    expect(chat.locator("#draft .cg-bot")).to_be_visible()
    ready(chat)
    assert len(texts(chat)) == 3 and texts(chat)[1] == "你好"
    expect(chat.locator("#problem")).to_be_hidden()


@pytest.mark.slow
def test_next_message_can_be_typed_during_a_reply(chat):
    say(chat, "讲个故事")
    box(chat).press_sequentially("下一句")
    box(chat).press("Enter")
    ready(chat)
    assert len(texts(chat)) == 3
    expect(box(chat)).to_have_value("下一句")


@pytest.mark.slow
def test_by_keyboard(chat):
    box(chat).fill("一")
    box(chat).press("Shift+Enter")
    box(chat).press_sequentially("二")
    expect(box(chat)).to_have_value("一\n二")
    box(chat).press("Enter")
    expect(chat.locator("#draft .cg-bot")).to_be_visible()
    box(chat).press("Enter")
    box(chat).press_sequentially("三")
    box(chat).press("Enter")
    expect(chat.locator("#problem")).to_contain_text("按“停止”")
    box(chat).press("Escape")
    ready(chat)
    box(chat).fill("")
    box(chat).press("ArrowUp")
    expect(box(chat, "query")).to_have_value("一\n二")


@pytest.mark.slow
def test_what_a_slider_shows_is_in_force(chat):
    settings(chat, "parameters")
    for typed, shown in (("5", "2"), ("-1", "0.05"), ("0.7", "0.7")):
        box(chat, "temperature").fill(typed)
        box(chat, "temperature").press("Enter")
        box(chat, "temperature").blur()
        expect(box(chat, "temperature")).to_have_value(shown)
        assert exported(chat)["temperature"] == float(shown)
    chat.locator("#reset").click()
    expect(box(chat, "temperature")).not_to_have_value("0.7")
    assert "temperature" not in exported(chat), "the model's own"


def exported(page):
    """The parameters that the server has, from the file it makes of the conversation."""
    settings(page, "files")
    page.wait_for_timeout(1000)  # what was typed is on its way
    page.locator("#export").click()
    page.wait_for_timeout(1000)
    link = page.locator("#links a", has_text=".json").first
    expect(link).to_be_visible()
    data = link.get_attribute("href").split("base64,")[1]
    return json.loads(base64.b64decode(data))["generation"]


@pytest.mark.slow
def test_gallery(page, url):
    page.goto(url)
    expect(page.locator("#gallery .cg-card")).to_have_count(14, timeout=60_000)
    keep_screenshot(page, "gallery")
    page.locator(".cg-search").fill("金箍棒")
    expect(page.locator("#gallery .cg-card:visible")).to_have_count(1)
    page.locator("#gallery .cg-card:visible", has_text="孙悟空").click()
    expect(page.locator("h1:visible")).to_have_text("孙悟空")
    opener = page.locator(".cg-openers button").first
    text = opener.inner_text()
    opener.click()
    expect(page.locator("#log .cg-message")).to_have_count(3)
    assert texts(page)[1] == text
    page.on("dialog", lambda dialog: dialog.accept())
    tool(page, "cut").click()
    expect(page.locator("#log .cg-message")).to_have_count(1)
    assert page.console_errors == []


@pytest.mark.slow
def test_edit_and_clear(chat):
    say(chat, "你好")
    ready(chat)
    tool(chat, "edit").click()
    expect(box(chat, "query")).to_have_value("你好")
    box(chat, "query").fill("早上好")
    box(chat, "response").fill("早！")
    chat.locator("#save").click()
    expect(chat.locator("#log .cg-message").last).to_contain_text("早！")
    assert texts(chat)[1:] == ["早上好", "早！"]
    expect(box(chat, "query")).to_be_hidden()
    chat.locator("#head [data-do=new]").click()
    expect(chat.locator("#log .cg-message")).to_have_count(1)


@pytest.mark.slow
def test_character_persona_and_parameters(chat):
    say(chat, "你好")
    settings(chat, "parameters")
    box(chat, "temperature").fill("1.5")  # moved while the reply is written
    box(chat, "temperature").press("Enter")
    ready(chat)
    before = texts(chat)
    assert len(before) == 3
    pick(chat, "孙悟空")
    assert texts(chat) == [helpers.get_character("孙悟空").greeting]
    settings(chat, "persona")
    keep_screenshot(chat, "drawer")
    expect(box(chat, "bot_name")).to_have_value("孙悟空")  # what was chosen is drawn part by part
    box(chat, "bot_name").fill("")
    box(chat, "bot_name").blur()
    expect(chat.locator("#apply")).to_have_text(label("unapplied", "zh"))
    pick(chat, "林黛玉")  # what was not applied waits
    expect(chat.locator("#apply")).to_have_text(label("apply", "zh"))
    pick(chat, "孙悟空")
    expect(chat.locator("#apply")).to_have_text(label("unapplied", "zh"))
    expect(box(chat, "bot_name")).to_have_value("")
    chat.locator("#apply").click()
    expect(chat.locator("#problem")).to_contain_text("invalid persona")
    box(chat, "bot_name").fill("小悟空")
    box(chat, "greeting").fill("俺来也！")
    chat.locator("#apply").click()
    expect(chat.locator("#log .cg-name")).to_have_text("小悟空")
    assert texts(chat) == ["俺来也！"]
    pick(chat, "苏梦远")
    assert texts(chat) == before
    settings(chat, "parameters")
    expect(box(chat, "temperature")).to_have_value("1.5")


def pick(page, name):
    page.locator("#head [data-do=home]").click()
    card(page, name).click()
    expect(page.locator("#head h1")).to_have_text(name)


@pytest.mark.slow
def test_export_and_import(chat, tmp_path):
    say(chat, "你好")
    ready(chat)
    before = texts(chat)
    settings(chat, "files")
    chat.locator("#export").click()
    saved = {name: download(chat, name, tmp_path) for name in ("苏梦远.json", "苏梦远.md", "苏梦远_card.png")}
    assert json.loads(saved["苏梦远.json"].read_text("utf-8"))["history"][1][0] == "你好"
    chat.locator("#head [data-do=new]").click()
    expect(chat.locator("#log .cg-message")).to_have_count(1)
    upload(chat, saved["苏梦远.json"])
    expect(chat.locator("#log .cg-message")).to_have_count(3)
    assert texts(chat) == before
    upload(chat, saved["苏梦远_card.png"])
    expect(chat.locator("#log .cg-message")).to_have_count(1)
    upload(chat, saved["苏梦远.md"].rename(tmp_path / "not_a_chat.json"))
    expect(chat.locator("#problem")).to_contain_text("invalid JSON")


def download(page, name, folder):
    with page.expect_download() as downloading:
        page.get_by_role("link", name=name, exact=True).click()
    downloading.value.save_as(folder / name)
    return folder / name


def upload(page, file):
    page.locator("input[type=file]").first.set_input_files(file)


@pytest.mark.slow
def test_attack_does_nothing(chat):
    settings(chat, "persona")
    for name in ("bot_info", "user_info", "greeting"):
        box(chat, name).fill(ATTACK)
    box(chat, "bot_name").fill("<b>名</b>")
    chat.locator("#apply").click()
    expect(chat.locator("#log .cg-name")).to_have_text("<b>名</b>")
    say(chat, ATTACK)
    ready(chat)
    tool(chat, "edit").click()
    box(chat, "response").fill(ATTACK)
    chat.locator("#save").click()
    expect(chat.locator("#log .cg-message").last).to_contain_text("onerror")
    assert texts(chat) == [ATTACK, ATTACK, ATTACK]
    chat.wait_for_timeout(500)
    assert chat.evaluate("window.hit") is None
    assert chat.locator("#conversation img, #conversation script, #conversation b").count() == 0


@pytest.mark.slow
def test_a_tab_keeps_its_stream(chat):
    """Gradio would open and close one for every click, and now and then lose a click in between."""
    opened = []
    chat.on("request", lambda request: opened.append(request.url) if "/queue/data" in request.url else None)
    for _ in range(2):
        tool(chat, "edit").click()
        expect(box(chat, "response")).to_be_visible()
        chat.locator("#cancel").click()
        expect(box(chat, "response")).to_be_hidden()
    assert opened == []


@pytest.mark.slow
def test_reload_keeps_the_conversation(chat):
    say(chat, "你好")
    ready(chat)
    before = texts(chat)
    reload(chat)
    expect(chat.locator("#log .cg-message")).to_have_count(3, timeout=60_000)
    assert texts(chat) == before


@pytest.mark.slow
def test_reload_during_a_reply(chat):
    say(chat, "讲个故事")
    reload(chat)
    expect(chat.locator("#draft .cg-bot, #log .cg-message:nth-child(3)").first).to_be_visible(timeout=60_000)
    ready(chat)
    assert len(texts(chat)) == 3 and texts(chat)[1] == "讲个故事"


@pytest.mark.slow
def test_second_tab_follows_the_first(chat):
    with second_tab(chat) as other:
        say(chat, "你好")
        expect(other.locator("#draft .cg-bot")).to_be_visible(timeout=10_000)
        ready(chat)
        expect(other.locator("#log .cg-message")).to_have_count(3, timeout=10_000)
        assert texts(other) == texts(chat)
        pick(other, "孙悟空")
        say(other, "师父好")
        say(chat, "还在吗")
        ready(other)
        ready(chat)
        assert texts(other)[1] == "师父好" and texts(chat)[3] == "还在吗"


@pytest.mark.slow
def test_two_visitors_at_once(chat, url):
    other = chat.context.browser.new_page()
    open_page(other, url)
    say(chat, "我是甲")
    say(other, "我是乙")
    ready(chat)
    ready(other)
    assert (texts(chat)[1], texts(other)[1]) == ("我是甲", "我是乙")
    other.close()


@pytest.mark.slow
def test_password_is_asked_for(page, nano):
    with launch(*nano, port=0, password="reader:secret") as demo:
        page.goto(demo.url)
        page.locator("input").first.fill("reader")
        page.locator("input[type=password]").fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator("#gallery .cg-card").first).to_be_visible(timeout=60_000)
    assert page.outside_requests == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "width", "scheme"), [("desktop", 1280, "light"), ("dark", 1280, "dark"), ("phone", 390, "light")]
)
def test_looks(page, url, name, width, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 860})
    open_page(page, url)
    for text in ("你好呀，小苏", "最近在忙什么？"):
        say(page, text)
        ready(page)
    tool(page, "regenerate").click()
    expect(page.locator("#draft .cg-bot")).to_be_visible()
    ready(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out at the side"
    for button in ("send", "stop", "undo", "impersonate"):
        left, right = page.locator(f"#{button}").evaluate(
            "e => [e.getBoundingClientRect().left, e.getBoundingClientRect().right]"
        )
        assert left >= 0 and right <= width
    log = page.locator("#conversation").bounding_box()
    last = page.locator("#log .cg-message").last.bounding_box()
    assert last["y"] + last["height"] <= log["y"] + log["height"], "the newest message is in view"
    keep_screenshot(page, name)
