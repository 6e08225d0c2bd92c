"""What notebook 03 says under its outputs is what its stored outputs show."""

import re

import pytest
import rules
from nbformat import NotebookNode
from rules import said


@pytest.fixture(scope="module")
def notebook() -> NotebookNode:
    return rules.read_notebook("03")


def test_the_calls_by_hand_say_what_the_session_says(notebook):
    assert said(notebook, "by_hand = []").count("ChatSession 说的一样： True") == 2


def test_a_stream_gives_the_whole_text_so_far_each_time(notebook):
    texts = said(notebook, "for text in session.stream(").splitlines()
    assert 1 < len(texts) <= 8
    assert all(longer.startswith(text) and len(longer) > len(text) for text, longer in zip(texts, texts[1:]))


def test_only_the_last_turn_changes_and_undo_takes_one_away(notebook):
    steps = re.findall(r"^(.+?)：(\d) 项，最后一项是 (.*)$", said(notebook, 'steps["撤回"]'), re.MULTILINE)
    assert [(name, count) for name, count, _ in steps] == [
        ("一开始", "3"),
        ("重说", "3"),
        ("编辑回复", "3"),
        ("撤回", "2"),
    ]
    assert "我在收拾行李" in steps[2][2]


def test_a_kept_cache_makes_the_first_token_come_sooner(notebook):
    kept, dropped = map(float, re.findall(r"要等 ([\d.]+) 毫秒", said(notebook, "long_talk.free_cache()")))
    assert kept < dropped / 2


def test_the_short_limit_cuts_and_a_small_context_drops_most_turns(notebook):
    shown = said(notebook, "for limit in (3, MAX_NEW_TOKENS)")
    assert re.search(r"3 +3 +False", shown) and "True" in shown
    turns, dropped = map(int, re.search(r"长对话的 (\d+) 轮里，最早的 (\d+) 轮", shown).groups())
    assert dropped > turns / 2


def test_cards_come_back_as_they_were(notebook):
    assert said(notebook, "helpers.export_card_png(my_card)").count("读回来和原来一样 True") == 2


def test_the_duet_ends_for_a_reason_and_the_four_lines_show_the_others(notebook):
    shown = said(notebook, "converse(model, tokenizer, speaker")
    assert re.search(r"停下的原因：(empty|repeated|goodbye|turns)\n", shown)
    assert re.findall(r"”：(\S+)", shown) == ["接着聊", "empty", "repeated", "goodbye"]


def test_a_restored_conversation_goes_on_alike_and_the_model_is_let_go(notebook):
    assert "相同：True" in said(notebook, "ChatSession.restore(")
    assert "模型已经不在内存里： True" in said(notebook, "watch() is None")
