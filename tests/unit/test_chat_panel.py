"""The notebook panel without a browser, on CharacterGLM-Nano: buttons are clicked, fields filled, threads joined."""

import base64
import gc
import html
import json
import re
import threading
import time
import weakref
from contextlib import contextmanager
from datetime import datetime

import pytest

import helpers
from helpers.demo import notebook
from helpers.demo.notebook import ChatPanel
from helpers.errors import BusyError, CharacterError, ChatError

GREEDY = {"do_sample": False, "max_new_tokens": 12}
ATTACK = "<img src='http://example.invalid/x.png' onerror=\"window.hit=1\"><script>hit()</script>&amp;"


@pytest.fixture(scope="module")
def nano():
    return helpers.load("nano", dtype="float32", device_map="cpu")


@pytest.fixture
def panel(nano):
    return ChatPanel(*nano, **GREEDY)


@contextmanager
def paused(panel, tokens=3):
    """The reply being written waits after some tokens, until the block ends; it is over when this returns."""
    go_on, written = threading.Event(), threading.Event()
    count = 0

    def hook(module, inputs):
        nonlocal count
        count += 1
        if count > tokens:
            written.set()
            go_on.wait(60)

    handle = panel.session.model.register_forward_pre_hook(hook)
    try:
        yield written
    finally:
        go_on.set()
        panel.wait()
        handle.remove()


def click(panel, name):
    panel.view.buttons[name].click()


def say(panel, text):
    panel.view.input.value = text
    click(panel, "send")
    panel.wait()


def shown(panel):
    """The texts on the screen, oldest first."""
    said = [re.sub("</?em>", "", message.value) for message in reversed(panel.view.log.children)]  # stage directions
    texts = [re.sub("<[^>]+>", "\n", message) for message in said]
    return [html.unescape(text).strip().partition("\n")[2] for text in texts]


def texts(panel):
    return [text for entry in panel.session.history for text in entry if text]


def error(panel):
    return panel.view.status.value if panel.view.status.layout.display != "none" else ""


def press_enter(panel):
    panel.view.input._handle_custom_msg({"event": "submit"}, [])
    time.sleep(notebook.ENTER_SECONDS + 0.1)
    panel.wait()


# --- talking


def test_the_character_speaks_first(panel):
    assert shown(panel) == [panel.session.session_meta.greeting]


def test_send_shows_both_sides_and_empties_the_input(nano, panel):
    card = panel.session.session_meta
    say(panel, "你好呀")
    reply = helpers.chat(*nano, card, "你好呀", [["", card.greeting]], **GREEDY)[0]
    assert shown(panel) == texts(panel) == [card.greeting, "你好呀", reply]
    assert panel.view.input.value == error(panel) == ""


def test_enter_sends_what_arrives_right_after_the_key(panel):
    threading.Timer(0.02, lambda: setattr(panel.view.input, "value", "你好呀")).start()
    press_enter(panel)
    assert texts(panel)[1] == "你好呀"


def test_reply_grows_on_the_screen(panel, monkeypatch):
    monkeypatch.setattr(notebook, "REFRESH_SECONDS", 0)
    drawn = []
    draw = panel.view.draw
    monkeypatch.setattr(panel.view, "draw", lambda *args: (draw(*args), drawn.append(shown(panel)[2:])))
    panel.send("你好呀", block=True)
    growing = [text[0].removesuffix(" ▌") for text in drawn]
    assert len(growing) > 3
    assert growing == sorted(growing, key=len)
    assert growing[-1] == texts(panel)[2]


def test_the_cell_is_done_while_the_reply_is_written(panel):
    panel.view.input.value = "你好呀"
    with paused(panel) as written:
        click(panel, "send")
        assert written.wait(60)
        assert not panel.view.buttons["stop"].disabled
        assert all(panel.view.buttons[name].disabled for name in ("send", "regenerate", "undo", "edit", "clear"))
        assert panel.view.picker.disabled
    assert panel.view.buttons["stop"].disabled
    assert not panel.view.buttons["send"].disabled


def test_double_click_sends_once(panel):
    panel.view.input.value = "你好呀"
    with paused(panel) as written:
        click(panel, "send")
        written.wait(60)
        click(panel, "send")
    assert [query for query, _ in panel.session.history] == ["", "你好呀"]
    assert error(panel) == ""


@pytest.mark.parametrize("name", ["undo", "regenerate", "clear"])
def test_double_click_acts_once(panel, name, monkeypatch):
    monkeypatch.setattr(notebook, "DOUBLE_CLICK_SECONDS", 60)  # a busy machine takes its time for the second click
    say(panel, "你好呀")
    say(panel, "然后呢")
    click(panel, name)
    panel.wait()
    before = panel.session.export()
    click(panel, name)
    panel.wait()
    assert panel.session.export() == before
    assert error(panel) == ""


def test_message_typed_while_a_reply_is_written_stays_in_the_input(panel):
    with paused(panel) as written:
        panel.send("你好呀")
        written.wait(60)
        panel.view.input.value = "我还想说"
        press_enter_without_waiting(panel)
        assert "busy" in error(panel)
    assert panel.view.input.value == "我还想说"
    assert len(texts(panel)) == 3


def press_enter_without_waiting(panel):
    panel.view.input._handle_custom_msg({"event": "submit"}, [])
    time.sleep(notebook.ENTER_SECONDS + 0.1)


def test_stop_keeps_the_partial_reply(panel):
    panel.session.set_generation(min_new_tokens=12)
    with paused(panel) as written:
        panel.send("讲个长故事")
        written.wait(60)
        click(panel, "stop")
    say_it_all = panel.session.statistics["new_tokens"]
    assert 1 <= say_it_all < 12
    assert shown(panel) == texts(panel)


def test_moving_a_parameter_while_a_reply_is_written(panel):
    panel.session.set_generation(min_new_tokens=12)
    with paused(panel) as written:
        panel.send("你好呀")
        written.wait(60)
        panel.view.sliders["temperature"].value = 1.5
    assert panel.session.statistics["new_tokens"] == 12
    assert panel.session.generation["temperature"] == 1.5
    assert panel.view.sliders["temperature"].value == 1.5


# --- other replies, undo, edit


def three_replies(panel):
    panel.session.set_generation(do_sample=True, temperature=2.0, seed=1)
    panel.send("你好呀", block=True)
    panel.regenerate(block=True)
    panel.regenerate(block=True)
    assert len(set(panel.session.alternatives)) == 3


def test_swipe_between_replies_of_different_seeds(panel):
    three_replies(panel)
    assert (panel.view.position.value, panel.view.swipes.layout.display) == ("3/3", "")
    click(panel, "previous")
    assert (panel.view.position.value, shown(panel)[-1]) == ("2/3", panel.session.alternatives[1])
    for _ in range(5):
        click(panel, "next")
    assert (panel.view.position.value, shown(panel)[-1]) == ("3/3", panel.session.alternatives[2])
    panel.send("然后呢", block=True)
    assert panel.view.swipes.layout.display == "none"


def test_undo_gives_the_text_back_but_not_over_another(panel):
    say(panel, "你好呀")
    click(panel, "undo")
    assert (shown(panel), panel.view.input.value) == (texts(panel), "你好呀")
    say(panel, "你好呀")
    panel.view.input.value = "没写完的"
    panel.undo()
    assert panel.view.input.value == "没写完的"


def test_edit_of_either_side(panel):
    say(panel, "你好呀")
    click(panel, "edit")
    view = panel.view
    assert [view.query.value, view.response.value] == panel.session.history[-1]
    view.query.value, view.response.value = "晚上好", "你也好"
    click(panel, "save")
    assert shown(panel)[1:] == ["晚上好", "你也好"]
    assert view.editor.layout.display == "none"


def test_bad_edit_stays_in_the_form(panel):
    say(panel, "你好呀")
    before = texts(panel)
    click(panel, "edit")
    panel.view.query.value = " "
    click(panel, "save")
    assert "empty text" in error(panel)
    assert panel.view.editor.layout.display == ""
    assert texts(panel) == before
    click(panel, "cancel")
    assert panel.view.editor.layout.display == "none"


def test_a_greeting_has_only_one_side_to_edit(panel):
    click(panel, "edit")
    assert panel.view.query.layout.display == "none"
    assert panel.view.response.layout.display != "none"
    panel.view.response.value = "换个开场白"
    click(panel, "save")
    assert shown(panel) == ["换个开场白"]


def test_clear(panel):
    say(panel, "你好呀")
    click(panel, "clear")
    assert shown(panel) == [panel.session.session_meta.greeting]


# --- characters


def test_every_character_keeps_its_conversation(panel):
    say(panel, "你好呀")
    before = shown(panel)
    panel.view.picker.value = "林黛玉"
    assert shown(panel) == [helpers.get_character("林黛玉").greeting]
    assert panel.view.persona["bot_name"].value == "林黛玉"
    panel.view.picker.value = "苏梦远"
    assert shown(panel) == before


def test_picking_while_a_reply_is_written_waits(panel):
    with paused(panel) as written:
        panel.send("你好呀")
        written.wait(60)
        panel.view.picker.value = "林黛玉"
        assert panel.view.picker.value == "苏梦远"
    assert texts(panel)[1] == "你好呀"
    assert shown(panel) == texts(panel)


def test_persona_is_applied_and_the_conversation_goes_on(nano, panel):
    fields = panel.view.persona
    fields["bot_name"].value, fields["greeting"].value = "苏苏", "哈喽"
    click(panel, "apply")
    assert shown(panel) == ["哈喽"], "before the first message the new greeting is shown"
    say(panel, "你好呀")
    fields["bot_name"].value, fields["bot_info"].value = "苏老师", "老师"
    click(panel, "apply")
    assert len(shown(panel)) == 3
    past = [list(entry) for entry in panel.session.history]
    say(panel, "讲课吧")
    meta = panel.session.session_meta
    assert (meta.bot_name, meta.bot_info) == ("苏老师", "老师")
    assert texts(panel)[-1] == helpers.chat(*nano, meta, "讲课吧", past, **GREEDY)[0]


def test_bad_persona_is_named_and_changes_nothing(panel):
    before = panel.session.session_meta
    panel.view.persona["user_name"].value = "  "
    click(panel, "apply")
    assert "user_name" in error(panel) and "invalid persona" in error(panel)
    assert panel.session.session_meta == before


def test_form_being_filled_survives_a_reply(panel):
    with paused(panel) as written:
        panel.send("你好呀")
        written.wait(60)
        panel.view.persona["bot_info"].value = "写了一半"
    assert panel.view.persona["bot_info"].value == "写了一半"


# --- files


def links(panel):
    found = re.findall(r'<a download="([^"]*)" href="data:([^;]*);base64,([^"]*)">', panel.view.links.value)
    return {html.unescape(name): (kind, base64.b64decode(data)) for name, kind, data in found}


def upload(panel, content):
    moment = datetime.now()
    file = {"name": "x", "type": "", "size": len(content), "last_modified": moment, "content": memoryview(content)}
    panel.view.upload.value = (file,)


def test_export_and_import_of_a_conversation(panel):
    three_replies(panel)
    panel.swipe(-1)
    click(panel, "export")
    files = links(panel)
    assert {name: kind for name, (kind, _) in files.items()} == {
        "苏梦远.json": "application/json",
        "苏梦远.md": "text/markdown",
        "苏梦远_card.json": "application/json",
        "苏梦远_card.png": "image/png",
    }
    assert files["苏梦远.md"][1].decode() == panel.session.to_markdown()
    exported = panel.session.export()
    upload(panel, files["苏梦远.json"][1])
    assert panel.view.picker.value == "苏梦远 (2)"
    assert panel.session.export() == exported
    assert panel.view.sliders["temperature"].value == 2.0
    assert panel.view.position.value == "2/3"
    assert panel.view.upload.value == ()
    assert panel.conversations.sessions["苏梦远"].export() == exported, "the open conversation is still there"


@pytest.mark.parametrize("ending", ["json", "png"])
def test_export_and_import_of_a_card(nano, panel, ending):
    card = helpers.CharacterCard(bot_name="小明/../x", bot_info="学生", greeting="嗨")
    panel.set_persona(card)
    click(panel, "export")
    upload(panel, links(panel)[f"小明_x_card.{ending}"][1])
    assert panel.session.session_meta == card
    assert panel.view.picker.value == card.bot_name
    assert shown(panel) == ["嗨"]
    assert panel.session.generation == GREEDY


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\x89PNG\r\n\x1a\n", b'{"spec": "chara_card_v3"}'])
def test_bad_file_is_refused_in_the_panel(panel, content):
    before = panel.conversations.names
    upload(panel, content)
    assert re.search(
        r"\[(invalid JSON|not a JSON object|not an exported chat|damaged image|no card in picture|not a character card)\]",
        error(panel),
    )
    assert panel.conversations.names == before
    say(panel, "你好呀")
    assert error(panel) == ""


def test_links_go_when_the_conversation_goes_on(panel):
    click(panel, "export")
    say(panel, "你好呀")
    assert panel.view.links.value == ""


# --- errors


def test_error_is_shown_and_gives_the_text_back(panel, nano, monkeypatch):
    say(panel, "你好呀")
    before = texts(panel)
    monkeypatch.setattr(nano[0], "generate", lambda *args, **options: 1 / 0)
    say(panel, "<b>然后呢</b>")
    assert "ZeroDivisionError" in error(panel)
    assert panel.view.input.value == "<b>然后呢</b>"
    assert shown(panel) == texts(panel) == before
    monkeypatch.undo()
    say(panel, "好了吗")
    assert error(panel) == ""
    assert len(shown(panel)) == 5


def test_headless_errors_are_raised(panel, nano, monkeypatch):
    with pytest.raises(ChatError, match="empty text"):
        panel.send(" ", block=True)
    with pytest.raises(ChatError, match="no exchange yet"):
        panel.regenerate(block=True)
    monkeypatch.setattr(nano[0], "generate", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        panel.send("你好呀", block=True)
    monkeypatch.undo()
    panel.send("你好呀", block=True)


def test_second_reply_is_refused_while_one_is_written(panel):
    with paused(panel) as written:
        panel.send("你好呀")
        written.wait(60)
        with pytest.raises(BusyError):
            panel.send("还有", block=True)
        with pytest.raises(BusyError):
            panel.open(helpers.export_card_png(helpers.get_character("阿九")))
    assert len(texts(panel)) == 3


def test_unknown_character_and_senseless_parameters_are_refused(nano):
    with pytest.raises(CharacterError, match="unknown character.*林黛玉"):
        ChatPanel(*nano, character="林代玉")
    with pytest.raises(CharacterError, match="unknown character"):
        ChatPanel(*nano, characters={})
    with pytest.raises(ChatError, match="temperature"):
        ChatPanel(*nano, temperature=0)


# --- what is shown


def test_text_is_escaped_everywhere(nano):
    card = helpers.CharacterCard(bot_name=ATTACK[:60], bot_info=ATTACK, user_name=ATTACK[:60], greeting=ATTACK)
    panel = ChatPanel(*nano, {ATTACK: card}, **GREEDY)
    panel.send(ATTACK, block=True)
    panel.edit(response=ATTACK)
    click(panel, "export")
    panel.view.show_error(ATTACK)
    parts = [message.value for message in panel.view.log.children]
    parts += [panel.view.links.value, panel.view.status.value, panel.view.meter.value]
    parts += [panel._repr_mimebundle_()["text/html"]]
    assert not re.search(r"<(img|script)", "".join(parts))
    assert html.unescape(parts[0]).count("onerror") == 2


def test_static_copy_shows_the_conversation(panel):
    say(panel, "你好呀")
    bundle = panel._repr_mimebundle_()
    assert bundle["text/plain"] == panel.session.to_markdown()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert all(html.escape(text) in bundle["text/html"] for text in texts(panel))


def test_meter_and_speed(panel):
    say(panel, "你好呀")
    used, limit = panel.session.context_used()
    assert f"上下文 {used:,} / {limit:,} token" in panel.view.meter.value
    assert re.search(r"首字 \d+\.\d\d 秒，之后每秒 \d+ token", panel.view.meter.value)


def test_sliders_show_and_set_the_parameters(panel):
    sliders = panel.view.sliders
    assert sliders["temperature"].value == panel.session.parameters.temperature
    assert sliders["max_length"].value == sliders["max_length"].max == 2048
    sliders["top_p"].value, sliders["max_length"].value = 0.5, 512
    assert panel.session.generation == {**GREEDY, "top_p": 0.5, "max_length": 512}
    assert "/ 512 token" in panel.view.meter.value


def test_imported_parameters_beyond_the_sliders_are_kept(nano, panel):
    session = helpers.ChatSession(*nano, {"bot_name": "甲"}, temperature=5.0, max_length=9000)
    panel.open(json.dumps(session.export()).encode())
    assert panel.session.generation == {"temperature": 5.0, "max_length": 9000}
    assert panel.view.sliders["temperature"].value == 5.0


def test_a_closed_panel_shows_what_was_said_and_frees_the_model():
    model, tokenizer = helpers.load("nano", dtype="float32", device_map="cpu")
    panel, watch = ChatPanel(model, tokenizer, **GREEDY), weakref.ref(model)
    say(panel, "你好")
    said = shown(panel)
    panel.close()
    panel.close()
    del model
    gc.collect()
    assert watch() is None
    assert shown(panel) == said and len(said) == 3
    assert all(button.disabled for button in panel.view.buttons.values())
