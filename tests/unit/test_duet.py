"""Two characters talk to each other, on CharacterGLM-Nano; where they must say something certain, they are made to."""

import json
from contextlib import contextmanager

import pytest

import helpers
from helpers.demo.duet import converse, reason_to_stop
from helpers.errors import ChatError
from helpers.model.tokenization import NEWLINE_ID

FIRST = {"bot_name": "阿九", "bot_info": "飞船"}
SECOND = {"bot_name": "林舟", "bot_info": "船长"}
OPENING = ("阿九", "我们来聊聊星星吧。")


@pytest.fixture(scope="module")
def nano():
    return helpers.load("nano", dtype="float32", device_map="cpu")


@contextmanager
def saying(model, tokenizer, replies):
    """Make the model say these replies, one after the other, whatever the prompts."""
    texts = [tokenizer(reply, add_special_tokens=False)["input_ids"] if reply else [] for reply in replies]
    script = iter([token for text in texts for token in [*text, NEWLINE_ID]])

    def hook(module, args, output):
        output.logits[:, -1, :] = -1e4
        output.logits[:, -1, next(script)] = 1e4

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_each_speaks_in_turn_and_sees_the_other_as_the_user(nano):
    heard = []
    li_bai, a_jiu = helpers.get_character("李白"), helpers.get_character("阿九")
    talk = converse(*nano, li_bai, a_jiu, "月亮", turns=4, on_line=lambda *line: heard.append(line), seed=4)
    assert talk.lines == heard
    assert talk.lines[0] == ("李白", "我们来聊聊月亮吧。")
    assert [name for name, _ in talk.lines[:3]] == ["李白", "阿九", "李白"]
    meta = helpers.SessionMeta(bot_name="阿九", bot_info=a_jiu.bot_info, user_name="李白", user_info=li_bai.bot_info)
    assert talk.lines[1][1] == helpers.chat(*nano, meta, talk.lines[0][1], seed=4)[0]
    meta = helpers.SessionMeta(bot_name="李白", bot_info=li_bai.bot_info, user_name="阿九", user_info=a_jiu.bot_info)
    past = [["", talk.lines[0][1]]]
    assert talk.lines[2][1] == helpers.chat(*nano, meta, talk.lines[1][1], past, seed=5)[0]


@pytest.mark.parametrize("turns", [3, 4])
def test_export_holds_every_line_and_can_be_continued(nano, turns):
    talk = converse(*nano, FIRST, SECOND, "星星", turns=turns, seed=1)
    exported = json.loads(json.dumps(talk.session.export()))
    restored = helpers.ChatSession.restore(*nano, exported)
    assert [text for entry in restored.history for text in entry if text] == [text for _, text in talk.lines]
    paragraphs = talk.to_markdown().split("\n\n")
    assert paragraphs == [f"**{name}**：{text}" for name, text in talk.lines]
    restored.send("我也想加入")
    assert len(talk.lines) == turns + 1 or talk.ended != "turns"


@pytest.mark.parametrize(
    "replies, ended, kept",
    [
        (["真亮啊", "数过几颗", "三百颗", "不止吧"], "turns", 4),
        (["真亮啊", "那我走了，再见！", "三百颗", "不止吧"], "goodbye", 2),
        (["真亮啊", "", "三百颗", "不止吧"], "empty", 1),
        (["真亮啊", "（沉默）……", "三百颗", "不止吧"], "empty", 1),
        (["真亮啊", "数过几颗", "（笑）真亮啊！", "不止吧"], "repeated", 2),
        (["今晚的星星真亮", "数过几颗", "今晚的星星真亮呀", "不止吧"], "repeated", 2),
        (["真亮啊", "我们来聊聊星星吧", "三百颗", "不止吧"], "repeated", 1),
    ],
)
def test_they_stop(nano, replies, ended, kept):
    with saying(*nano, replies):
        talk = converse(*nano, FIRST, SECOND, "星星", turns=4)
    assert talk.ended == ended
    assert talk.lines == [OPENING, *zip(["林舟", "阿九"] * 2, replies[:kept])]
    assert [text for entry in talk.session.history for text in entry if text] == [text for _, text in talk.lines]


@pytest.mark.parametrize(
    "reply, reason",
    [
        ("像一面镜子。", ""),
        ("（望着月亮）……", "empty"),
        ("我们来聊聊星星吧！再见", "repeated"),
        ("不早了，晚安。", "goodbye"),
    ],
)
def test_a_reply_alone_says_whether_they_stop(reply, reason):
    assert reason_to_stop(reply, [OPENING]) == reason


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"topic": " "}, "empty topic"),
        ({"topic": None}, "empty topic"),
        ({"turns": 0}, "invalid turns"),
        ({"turns": True}, "invalid turns"),
        ({"second": FIRST}, "same name"),
        ({"temperature": -1}, "invalid generation parameter"),
    ],
)
def test_senseless_arguments_are_refused(nano, change, problem):
    with pytest.raises(ChatError, match=problem):
        converse(*nano, **{"first": FIRST, "second": SECOND, "topic": "星星", **change})
