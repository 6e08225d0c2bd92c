"""The web face without a browser: a real server on 127.0.0.1 with CharacterGLM-Nano, and Gradio's own client, which
keeps a session as a tab does."""

import base64
import gc
import html
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
import zipfile
from collections import deque
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from gradio_client import Client, handle_file
from gradio_client.exceptions import AuthenticationError
from typer.testing import CliRunner

import helpers
from helpers.cli.app import app
from helpers.demo import web, web_visitors
from helpers.demo.conversations import Conversations
from helpers.demo.web import WebDemo, launch, mount
from helpers.demo.web_visitors import Visitors
from helpers.errors import HelpersError
from helpers.network import free_port, listen, port_is_free
from helpers.serving import Server, create_app

GREEDY = {"do_sample": False, "max_new_tokens": 12}
ATTACK = "<img src='http://example.invalid/x.png' onerror=\"window.hit=1\"><script>hit()</script>&amp;"
# Buttons of the page's own HTML: Gradio hands on what was clicked as the data of the event `act`.
CLICKS = {
    *("open", "new", "drop", "home", "say", "branch", "regenerate", "continue"),
    *("previous", "next", "edit", "delete", "cut", "fit"),
}
LOCAL = {"127.0.0.1", "::1", "localhost"}


@pytest.fixture(scope="module")
def nano():
    return helpers.load("nano", dtype="float32", device_map="cpu")


@pytest.fixture(scope="module", autouse=True)
def connections():
    """Where this process, server and client, connects to."""
    hosts, patch = [], pytest.MonkeyPatch()
    for name in ("connect", "connect_ex"):
        original = getattr(socket.socket, name)

        def connect(self, address, original=original):
            if isinstance(address, tuple):
                hosts.append(address[0])
            return original(self, address)

        patch.setattr(socket.socket, name, connect)
    yield hosts
    patch.undo()


@pytest.fixture(scope="module")
def url(nano):
    with launch(*nano, port=0, **GREEDY) as demo:
        yield demo.url


class Tab:
    """One tab: calls what the components call and keeps what they then show."""

    def __init__(self, url, key="", **options):
        self.client = Client(url, verbose=False, **options)
        types = {component["id"]: component for component in self.client.config["components"]}
        event = next(event for event in self.client.config["dependencies"] if event["api_name"] == "open")
        outputs = [types[output] for output in event["outputs"] if not types[output]["skip_api"]]
        self.names = [output["props"].get("elem_id") or output["type"] for output in outputs]
        self.shown, self.steps, self.clicks = {}, [], deque()
        self.act = next(d["id"] for d in self.client.config["dependencies"] if d["api_name"] == "act")
        self.client.send_data = partial(self.send_data, self.client.send_data)
        self.end(self.client.submit(key, api_name="/open"))  # not the click on a character
        self.key = self.shown["browserstate"]

    def __call__(self, name, *values):
        return self.end(self.begin(name, *values))

    def begin(self, name, *values):
        if name not in CLICKS:
            return self.client.submit(*values, api_name=f"/{name}")
        self.clicks.append({"what": name, "at": str(values[0]) if values else ""})
        return self.client.submit(api_name="/act")

    def send_data(self, send, data, event, *more):
        clicked = {"event_data": self.clicks.popleft()} if event["fn_index"] == self.act else {}
        return send({**data, **clicked}, event, *more)

    def end(self, job):
        job.result(timeout=120)
        self.steps = job.outputs()
        for step in self.steps:
            for name, value in zip(self.names, step):
                if not isinstance(value, dict):
                    self.shown[name] = value
                elif "value" in value:
                    self.shown[name] = value["value"]
        return self

    def texts(self):
        """The messages in the conversation, oldest first."""
        return messages(self.shown["log"])

    def position(self):
        return (re.findall('id="position">([^<]*)', self.shown["log"]) or [""])[0]

    def problem(self):
        return html.unescape(re.sub("<[^>]*>", "", self.shown["problem"]))

    def files(self):
        links = re.findall(r'download="([^"]+)" href="data:[^;]*;base64,([^"]*)"', self.shown["links"])
        return {html.unescape(name): base64.b64decode(content) for name, content in links}


def messages(log):
    said = re.findall(r'<div class="cg-name">[^<]*</div>(.*?)</div>', log, re.DOTALL)
    return [html.unescape(re.sub("</?em>", "", text)) for text in said]


@pytest.fixture
def tab(url):
    return Tab(url)


@contextmanager
def slow(model, seconds=0.05):
    handle = model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def paused(model, tokens=3):
    """Replies wait after some tokens until the block ends, or `go_on`, which is yielded, is set."""
    go_on, passes = threading.Event(), []

    def before(*_):
        passes.append(1)
        if len(passes) > tokens:
            go_on.wait(120)

    handle = model.register_forward_pre_hook(before)
    try:
        yield go_on
    finally:
        go_on.set()
        handle.remove()


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# --- talking


def test_send_answers_as_helpers_chat(tab, nano):
    card = helpers.get_character("苏梦远")
    assert tab.texts() == [card.greeting]
    tab("send", "你好呀")
    reply = helpers.chat(*nano, card, "你好呀", [["", card.greeting]], **GREEDY)[0]
    assert tab.texts() == [card.greeting, "你好呀", reply]
    assert tab.shown["draft"] == tab.shown["box"] == ""
    assert re.search(r"上下文 \d+ / 2,048 token · 首字 \d+\.\d\d 秒，之后每秒 \d+ token", tab.shown["meter"])


def test_reply_grows(tab, nano):
    with slow(nano[0]):
        tab("send", "讲个故事")
    drafts = [messages(step[tab.names.index("draft")])[-1] for step in tab.steps[:-1]]
    grown = [text.removesuffix(" ▌") for text in drafts]
    assert len(set(grown)) > 3
    assert all(later.startswith(earlier) for earlier, later in zip(grown, grown[1:]))
    assert tab.texts()[-1].startswith(grown[-1])


def test_stop_keeps_the_partial_reply(tab, nano):
    with paused(nano[0]) as go_on:
        job = tab.begin("send", "讲个故事")
        wait_until(lambda: len(job.outputs()) > 4)
        tab("stop")
        go_on.set()
        tab.end(job)
    query, partial = tab.texts()[1:]
    assert query == "讲个故事"
    tab("undo", "")
    tab("send", "讲个故事")
    whole = tab.texts()[-1]
    assert whole.startswith(partial) and len(partial) < len(whole)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_blank_message_does_nothing(tab, text):
    before = dict(tab.shown)
    tab("send", text)
    assert tab.shown == before


def test_regenerate_and_swipe(url):
    tab = Tab(url)
    tab("temperature", 2.0)
    tab("send", "你好")
    first = tab.texts()[-1]
    tab("regenerate")
    assert tab.position() == "2/2"
    second = tab.texts()[-1]
    tab("previous")
    assert (tab.texts()[-1], tab.position()) == (first, "1/2")
    tab("next")
    assert (tab.texts()[-1], tab.position()) == (second, "2/2")
    assert len(tab.texts()) == 3


def test_undo_returns_the_text_to_the_box(tab):
    tab("send", "你好")
    tab("undo", "")
    assert tab.shown["box"] == "你好" and len(tab.texts()) == 1


def test_undo_keeps_what_is_being_typed(tab):
    tab("send", "你好")
    tab("undo", "新的话")
    assert tab.shown["box"] == "新的话" and len(tab.texts()) == 1


def test_double_click_undoes_once(tab, monkeypatch):
    monkeypatch.setattr(web_visitors, "DOUBLE_CLICK_SECONDS", 60)  # a busy machine takes its time for the second click
    tab("send", "一")
    tab("send", "二")
    jobs = [tab.begin("undo", ""), tab.begin("undo", "")]
    for job in jobs:
        tab.end(job)
    assert "一" in tab.texts() and "二" not in tab.texts()


def test_edit_both_sides(tab):
    tab("send", "你好")
    tab("edit", 1)
    assert tab.shown["query"] == "你好" and tab.shown["response"] == tab.texts()[-1]
    tab("save", "早上好", "早！")
    assert tab.texts()[1:] == ["早上好", "早！"]
    tab("save", "  ", "早！")
    assert "[empty text]" in tab.problem() and tab.texts()[1:] == ["早上好", "早！"]


def test_clear_leaves_the_greeting(tab):
    tab("send", "你好")
    tab("new")
    assert tab.texts() == [helpers.get_character("苏梦远").greeting]


def test_any_exchange_can_be_edited_and_deleted(tab):
    for text in ("一", "二", "三"):
        tab("send", text)
    tab("edit", 1)
    assert tab.shown["query"] == "一"
    tab("save", "壹", "好")
    assert tab.texts()[1:4] == ["壹", "好", "二"]
    tab("delete", 1)
    assert "壹" not in tab.texts() and tab.texts()[1] == "二"
    tab("cut", 1)
    assert tab.texts() == [helpers.get_character("苏梦远").greeting]
    tab("delete", 7)
    assert "[no such exchange]" in tab.problem()


def test_a_reply_goes_on(tab, nano):
    tab("send", "讲个故事")
    before = tab.texts()[-1]
    tab("continue", 1)
    assert tab.texts()[-1].startswith(before) and len(tab.texts()[-1]) > len(before)
    assert tab.position() == "2/2"
    tab("previous", 1)
    assert tab.texts()[-1] == before, "as it was, it is still there"


def test_a_branch_leaves_the_conversation_as_it_was(tab):
    tab("send", "一")
    tab("send", "二")
    whole = tab.texts()
    tab("branch", 1)
    assert tab.texts() == whole[:3] and tab.shown["title"] == "苏梦远 (2)"
    tab("open", "苏梦远")
    assert tab.texts() == whole


def test_conversations_can_be_renamed_and_deleted(tab):
    tab("send", "你好")
    said = tab.texts()
    tab("rename", "第一次见面")
    tab("open", "孙悟空")
    tab("rename", "第一次见面")
    assert "[name taken or empty]" in tab.problem() and tab.shown["title"] == "孙悟空"
    tab("open", "第一次见面")
    assert tab.texts() == said
    other = Tab(tab.client.src, tab.key)
    other("drop", "第一次见面")
    tab("send", "还在吗")
    assert "[conversation gone]" in tab.problem()
    tab("home")
    assert "第一次见面" not in tab.shown["gallery"]


def test_openers_are_said_by_a_click(tab):
    opener = helpers.get_character("孙悟空").openers[1]
    tab("open", "孙悟空")
    assert html.escape(opener) in tab.shown["log"]
    tab("say", 1)
    assert tab.texts()[1] == opener and 'data-do="say"' not in tab.shown["log"]


def test_the_model_speaks_for_the_reader(tab, nano):
    tab("impersonate", "")
    card = helpers.get_character("苏梦远")
    me = {
        "bot_name": card.user_name,
        "bot_info": card.user_info,
        "user_name": card.bot_name,
        "user_info": card.bot_info,
    }
    assert tab.shown["box"] == helpers.chat(*nano, me, card.greeting, **GREEDY)[0]
    assert tab.texts() == [card.greeting] and tab.shown["draft"] == "", "it is only a proposal"


def test_two_characters_talk_until_they_are_stopped(tab, nano):
    tab("start", "孙悟空", "")
    assert "[empty topic]" in tab.problem()
    tab("start", "苏梦远", "月亮")
    assert "[same name]" in tab.problem()
    with slow(nano[0], 0.02):
        job = tab.begin("start", "孙悟空", "月亮")
        wait_until(lambda: job.done() or len(job.outputs()) > 30)
        tab("stop")
        tab.end(job)
    first, second, *_ = tab.texts()
    assert first == "我们来聊聊月亮吧。" and second
    me = helpers.get_character("孙悟空")
    facing = {"bot_name": "孙悟空", "bot_info": me.bot_info, "user_name": "苏梦远"}
    facing["user_info"] = helpers.get_character("苏梦远").bot_info
    assert second == helpers.chat(*nano, facing, first, **GREEDY)[0]


# --- persona and parameters


def test_a_persona_that_is_too_long_can_be_cut(tab):
    tab("apply", "小明", "爱哭。" * 3000, "老师", "", "老师好")
    tab("send", "坐下")
    assert "[prompt too long]" in tab.problem() and 'data-do="fit"' in tab.shown["problem"]
    tab("fit")
    assert 100 < len(tab.shown["bot_info"]) < 9000 and tab.problem() == ""
    tab("send", "坐下")
    assert tab.texts()[1] == "坐下" and tab.problem() == ""


def test_defaults_come_back(tab):
    before = tab.shown["temperature"]
    tab("temperature", 1.5)
    tab("reset")
    assert tab.shown["temperature"] == before
    tab("export")
    assert json.loads(tab.files()["苏梦远.json"])["generation"] == GREEDY


def test_a_persona_being_changed_is_not_lost(tab):
    fields = ("苏梦远", "换了人设", "我", "", "")
    tab("change", *fields)
    tab("open", "孙悟空")
    assert tab.shown["bot_info"] == helpers.get_character("孙悟空").bot_info
    tab("open", "苏梦远")
    assert tab.shown["bot_info"] == "换了人设"
    tab("export")
    assert "换了人设" not in tab.files()["苏梦远.json"].decode(), "not in force before it is applied"


def test_each_character_has_its_conversation(tab):
    tab("send", "你好")
    before = tab.texts()
    tab("open", "孙悟空")
    assert tab.shown["bot_name"] == "孙悟空"
    assert tab.texts() == [helpers.get_character("孙悟空").greeting]
    tab("open", "苏梦远")
    assert tab.texts() == before


def test_persona_reaches_the_prompt(tab, nano):
    tab("apply", "小明", "一名学生", "老师", "教数学", "老师好")
    assert tab.texts() == ["老师好"], "nothing was said yet: the new greeting is"
    tab("send", "坐下")
    meta = {"bot_name": "小明", "bot_info": "一名学生", "user_name": "老师", "user_info": "教数学"}
    assert tab.texts()[-1] == helpers.chat(*nano, meta, "坐下", [["", "老师好"]], **GREEDY)[0]
    tab("apply", "小红", "一名学生", "老师", "", "您好")
    assert tab.texts()[0] == "老师好" and "小红" in tab.shown["log"], "the conversation goes on"


@pytest.mark.parametrize(
    ("name", "values", "problem"),
    [
        ("apply", ("", "", "我", "", ""), "invalid persona"),
        ("apply", ("名" * 65, "", "我", "", ""), "invalid persona"),
        ("send", ("你" * 5000,), "prompt too long"),
        ("regenerate", (), "no exchange yet"),
        ("undo", ("",), "no exchange yet"),
    ],
)
def test_refusal_is_shown_and_changes_nothing(tab, name, values, problem):
    before = tab.texts()
    tab(name, *values)
    assert f"[{problem}]" in tab.problem()
    assert tab.texts() == before and tab.shown["draft"] == ""
    tab("send", "你好")
    assert tab.problem() == "" and len(tab.texts()) == 3


def test_parameter_moved_during_a_reply_counts_for_the_next(tab, nano):
    with paused(nano[0]) as go_on:
        job = tab.begin("send", "讲个故事")
        wait_until(lambda: len(job.outputs()) > 2)
        tab("top_p", 0.5)
        go_on.set()
        tab.end(job)
    assert len(tab.texts()) == 3 and tab.problem() == ""
    tab("export")
    exported = json.loads(tab.files()["苏梦远.json"])
    assert exported["generation"]["top_p"] == 0.5


def test_unsent_text_comes_back(tab, nano):
    def fail(*_):
        raise RuntimeError("CUDA out of memory")

    handle = nano[0].register_forward_pre_hook(fail)
    tab("send", "你好")
    handle.remove()
    assert "CUDA out of memory" in tab.problem()
    assert len(tab.texts()) == 1 and tab.shown["box"] == ""
    tab("restore", "")
    assert tab.shown["box"] == "你好"
    tab("restore", "新的话")
    assert tab.shown["box"] == "你好", "only once; what is being typed stays"
    tab("send", "你好")
    assert tab.problem() == "" and len(tab.texts()) == 3


# --- visitors and tabs


def test_two_visitors_at_once(url, nano):
    tabs = [Tab(url), Tab(url)]
    assert tabs[0].key != tabs[1].key
    with slow(nano[0], 0.02):
        jobs = [tab.begin("send", text) for tab, text in zip(tabs, ("我是甲", "我是乙"))]
        for tab, job in zip(tabs, jobs):
            tab.end(job)
    assert [tab.texts()[1] for tab in tabs] == ["我是甲", "我是乙"]
    assert all(len(tab.texts()) == 3 and tab.texts()[2] for tab in tabs)


def test_second_tab_of_a_browser_shows_the_same(tab, url):
    second = Tab(url, tab.key)
    tab("send", "你好")
    assert len(second.texts()) == 1
    second("tick")
    assert second.texts() == tab.texts() and second.key == tab.key
    second("open", "孙悟空")
    tab("tick")
    assert "陆导" in tab.texts()[0], "each tab has its own choice of the character"


def test_two_tabs_do_not_write_at_once(tab, url, nano):
    second = Tab(url, tab.key)
    with paused(nano[0]) as go_on:
        job = tab.begin("send", "讲个故事")
        wait_until(lambda: len(job.outputs()) > 2)
        second("send", "我也说")
        second("undo", "")
        assert "[busy]" in second.problem()
        go_on.set()
        tab.end(job)
    assert [len(tab.texts()), tab.texts()[1]] == [3, "讲个故事"]


def test_reload_during_a_reply_loses_nothing(tab, url, nano):
    with slow(nano[0], 0.1), paused(nano[0]) as go_on:
        job = tab.begin("send", "讲个故事")
        wait_until(lambda: len(job.outputs()) > 2)
        job.cancel()
        reloaded = Tab(url, tab.key)
        following = reloaded.begin("follow")  # as the browser does after "open"
        wait_until(lambda: following.outputs())
        go_on.set()
        reloaded.end(following)
    drafts = {step[reloaded.names.index("draft")] for step in reloaded.steps}
    assert len(drafts) > 3, "it goes on growing on the new page"
    assert reloaded.texts()[1] == "讲个故事" and len(reloaded.texts()) == 3


def test_nobody_chooses_their_id(url):
    assert Tab(url, "0").key != "0"
    assert len(Tab(url, "../../etc").key) > 20


def test_calls_without_an_open_page_are_told_to_reload(url):
    client = Client(url, verbose=False)
    assert "[page expired]" in str(client.predict("你好", api_name="/send"))


# --- files


def test_export_and_import(tab, url, tmp_path):
    tab("send", "你好")
    tab("export")
    files = tab.files()
    assert list(files) == ["苏梦远.json", "苏梦远.md", "苏梦远_card.json", "苏梦远_card.png"]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    other = Tab(url)
    other("import", handle_file(tmp_path / "苏梦远.json"))
    assert other.texts() == tab.texts() and other.shown["title"] == "苏梦远 (2)"
    other("import", handle_file(tmp_path / "苏梦远_card.png"))
    assert other.texts() == tab.texts()[:1] and other.shown["title"] == "苏梦远 (3)"
    other("open", "苏梦远 (2)")
    assert other.texts() == tab.texts()
    assert "你好" in files["苏梦远.md"].decode()


def test_export_all(tab):
    tab("send", "你好")
    tab("open", "孙悟空")
    tab("export_all")
    with zipfile.ZipFile(io.BytesIO(tab.files()["conversations.zip"])) as archive:
        assert archive.namelist() == ["01_苏梦远.json", "02_孙悟空.json"]
        assert json.loads(archive.read("01_苏梦远.json"))["history"][1][0] == "你好"


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\x89PNG\r\n\x1a\nrest"])
def test_bad_file_is_refused(tab, tmp_path, content):
    (tmp_path / "bad.json").write_bytes(content)
    before = tab.texts()
    tab("import", handle_file(tmp_path / "bad.json"))
    assert re.search(r"\[[\w ]+\]：", tab.problem())
    assert tab.texts() == before and tab.shown["title"] == "苏梦远"


# --- safety


def test_everything_is_escaped(tab):
    tab("apply", ATTACK[:64], ATTACK, ATTACK[:64], ATTACK, ATTACK)
    tab("send", ATTACK)
    tab("save", ATTACK, ATTACK)
    tab("export")
    assert tab.texts() == [ATTACK, ATTACK, ATTACK]
    tab("rename", ATTACK[:64])
    tab("home")
    ours = {"div", "span", "a", "progress", "em", "button", "b", "i", "q", "h1", "h2", "input"}
    ours |= {"svg", "path", "use", "symbol", "rect", "circle", "g"}
    for name in ("log", "draft", "problem", "meter", "links", "head", "gallery", "talk"):
        assert set(re.findall(r"<\s*(\w+)", tab.shown[name])) <= ours, name
        assert " onerror" not in re.sub('>[^<]*<|"[^"]*"', "", tab.shown[name]), name


def test_password(nano):
    with launch(*nano, port=0, password="甲:se:cret") as demo:
        assert httpx.get(f"{demo.url}/config").status_code == 401
        for wrong in (("甲", "se"), ("乙", "se:cret")):
            with pytest.raises((AuthenticationError, ValueError)):
                Client(demo.url, verbose=False, auth=wrong)
        assert Tab(demo.url, auth=("甲", "se:cret")).texts()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"host": "0.0.0.0"}, "password required"),
        ({"host": "0.0.0.0", "password": ""}, "password required"),
        ({"host": "::"}, "password required"),
        ({"password": "no colon"}, "malformed password"),
        ({"password": ":secret"}, "malformed password"),
        ({"host": "203.0.113.1", "insecure": True}, "cannot bind"),
        ({"language": "fr"}, "unknown language"),
        ({"temperature": 0}, "invalid generation parameter"),
    ],
)
def test_launch_refuses(nano, options, problem):
    with pytest.raises(HelpersError, match=rf"\[{problem}\]"):
        launch(*nano, **{"port": 0, **options})


def test_port_in_use_names_a_free_one(nano):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HelpersError, match="port in use") as caught:
            launch(*nano, port=port)
    named = int(re.search(r"例如 (\d+)", str(caught.value))[1])
    assert named != port
    assert port_is_free("127.0.0.1", named)


def test_nothing_leaves_the_machine(tab, connections):
    tab("send", "你好")
    assert connections and set(connections) <= LOCAL


# --- where it runs


def test_stop_frees_the_port_and_the_model_goes_on(nano):
    demo = launch(*nano, port=0, **GREEDY)
    Tab(demo.url)
    demo.stop()
    listen("127.0.0.1", demo.port).close()
    assert helpers.chat(*nano, helpers.get_character("李白"), "你好", **GREEDY)[0]


def test_a_stopped_page_lets_go_of_its_model():
    model, tokenizer = helpers.load("nano", dtype="float32", device_map="cpu")
    alive = weakref.ref(model)
    demo = launch(model, tokenizer, port=0, **GREEDY)
    Tab(demo.url)("send", "你好")
    demo.stop()
    del demo, model
    gc.collect()
    assert alive() is None


def test_mounted_on_another_app(nano):
    other = FastAPI()
    other.get("/health")(lambda: {"status": "ready"})
    with WebDemo(mount(other, *nano, **GREEDY), listen("127.0.0.1", 0)) as demo:
        assert httpx.get(f"{demo.url}/health").json() == {"status": "ready"}
        tab = Tab(f"{demo.url}/demo/")
        tab("send", "你好")
        assert len(tab.texts()) == 3


@pytest.mark.slow
def test_one_model_serves_page_and_api_at_the_same_time(nano):
    long = {"do_sample": False, "min_new_tokens": 60, "max_new_tokens": 60}
    both = mount(create_app(nano, api_key="reader"), *nano, **long)
    asked = {"messages": [{"role": "user", "content": "你好"}], "temperature": 0, "max_tokens": 4}
    headers = {"Authorization": "Bearer reader"}
    with WebDemo(both, listen("127.0.0.1", 0)) as demo:
        wait_until(lambda: both.state.service.status == "ready")
        tab, completions = Tab(f"{demo.url}/demo/"), f"{demo.url}/v1/chat/completions"
        with slow(nano[0], 0.05):
            writing = tab.begin("send", "你好")
            answer = httpx.post(completions, json=asked, headers=headers, timeout=60)
            assert not writing.done(), "the API answers while the page's reply is being written"
            tab.end(writing)
        assert httpx.post(completions, json=asked).status_code == 401
        assert httpx.get(f"{demo.url}/health").json()["status"] == "ready"
    card = helpers.get_character("苏梦远")
    expected, _ = helpers.chat(*nano, card, "你好", do_sample=False, max_new_tokens=4)
    assert answer.json()["choices"][0]["message"]["content"] == expected
    assert tab.texts()[-1] == helpers.ChatSession(*nano, card, **long).send("你好")


def test_english_page(nano):
    with launch(*nano, port=0, language="en") as demo:
        tab = Tab(demo.url)
        labels = {
            component["props"].get("value")
            for component in tab.client.config["components"]
            if component["type"] == "button"
        }
        tab("undo", "")
        assert tab.problem() == "No exchange yet: say something first"
        tab("apply", "", "", "I", "", "")
        assert tab.problem().startswith("Invalid persona (")
        tab("send", "你好")
    assert {"Send", "Stop", "Undo"} <= labels
    assert "first token after" in tab.shown["meter"]


def test_command_line(tmp_path):
    port = free_port(20000 + os.getpid() % 20000)
    command = [sys.executable, "-m", "helpers", "demo", "--model", "nano", "--port", str(port)]
    with (tmp_path / "log").open("w+") as log:
        # A shell that starts the tests in the background lets them, and what they start, ignore Ctrl-C.
        process = subprocess.Popen(
            command, stdout=log, stderr=log, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        )
        try:
            wait_until(lambda: "[serving]" in (tmp_path / "log").read_text("utf-8"), seconds=180)
            assert len(Tab(f"http://127.0.0.1:{port}").texts()) == 1
            process.send_signal(signal.SIGINT)
            assert process.wait(120) == 0
        finally:
            process.kill()
        assert "Traceback" not in (tmp_path / "log").read_text("utf-8")


def test_demo_shows_the_persona_of_its_adapter_first(tmp_path, monkeypatch):
    (tmp_path / "card.json").write_text('{"bot_name": "阿青", "bot_info": "剑客"}', encoding="utf-8")
    shown = []
    monkeypatch.setattr(web, "load", lambda *args, **options: (None, None))
    monkeypatch.setattr(web, "mount", lambda *args, **options: shown.extend(options["characters"]))
    monkeypatch.setattr(web, "_server", lambda app: SimpleNamespace(run=lambda sockets: None))
    port = str(free_port(20000 + os.getpid() % 20000))
    assert CliRunner().invoke(app, ["demo", "--adapter", str(tmp_path), "--port", port]).exit_code == 0
    assert shown == ["阿青", *helpers.load_characters()]


@pytest.mark.slow
def test_page_beside_the_api(tmp_path):
    options = ["--page", "--password", "reader:secret"]
    with Server(
        "nano", log_file=tmp_path / "log", port=free_port(21000 + os.getpid() % 20000), options=options
    ) as server:
        tab = Tab(f"{server.url}/demo/", auth=("reader", "secret"))
        tab("send", "你好")
        assert len(tab.texts()) == 3
        with pytest.raises((AuthenticationError, ValueError)):
            Tab(f"{server.url}/demo/", auth=("reader", "wrong"))
        assert httpx.post(f"{server.url}/", json={"prompt": "你好"}, timeout=60).json()["status"] == 200
        tab.client.close()


@pytest.mark.parametrize(
    "options, message",
    [(["--replicas", "2"], "page needs one model"), (["--host", "0.0.0.0", "--api-key", "k"], "password required")],
)
def test_page_beside_the_api_refuses(options, message):
    done = CliRunner().invoke(app, ["serve", "--model", "nano", "--page", *options])
    assert done.exit_code == 1 and f"[{message}]" in str(done.exception)


# --- who is remembered


def test_visitor_who_was_away_for_longest_is_forgotten(nano, monkeypatch):
    monkeypatch.setattr(web_visitors, "MAX_VISITORS", 2)
    visitors = Visitors(lambda: Conversations(*nano))
    first, second = visitors.get("")[0], visitors.get("")[0]
    assert visitors.get(first)[0] == first
    visitors.get("")
    assert visitors.get(first)[0] == first
    assert visitors.get(second)[0] != second


def test_only_the_newest_conversations_keep_their_cache(nano, monkeypatch):
    monkeypatch.setattr(web_visitors, "MAX_CACHES", 2)
    visitors = Visitors(lambda: Conversations(*nano, **GREEDY))
    sessions = [visitors.get("")[1].session for _ in range(3)]
    for session in sessions:
        reply = session.begin("你好")
        visitors.keep_cache(session)
        reply.wait()
    with forward_lengths(nano[0]) as lengths:
        for session in sessions:
            session.send("然后呢")
    prompts = [length for length in lengths if length > 1]
    assert prompts[0] > 2 * prompts[1] and prompts[1] == prompts[2], "only the first computed its whole prompt again"
    assert sessions[0].history == sessions[1].history


@contextmanager
def forward_lengths(model):
    """How many tokens each forward pass computes."""
    lengths = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    yield lengths
    handle.remove()
