"""What notebook 03 says under its outputs is what its stored outputs show."""

import ast
import json
import re

import pytest
import rules
from nbformat import NotebookNode
from rules import said, the_cell

from helpers.model.loading import NANO_DIR


@pytest.fixture(scope="module")
def notebook() -> NotebookNode:
    return rules.read_notebook("03")


def test_the_calls_by_hand_say_what_the_session_says_and_the_whole_text_is_shown(notebook):
    shown = said(notebook, "output = model.generate(")
    assert shown.count("ChatSession 说的一样： True") == 2
    speakers = re.findall(r"^\[(.+?)\]", shown.partition("\n\n")[2], re.MULTILINE)
    assert speakers == ["苏梦远", "陆星辰", "苏梦远", "陆星辰", "苏梦远"]


def test_the_picture_of_the_panel_holds_three_exchanges(notebook):
    (panel,) = (output.data["text/html"] for output in the_cell(notebook, "panel = ChatPanel(").outputs)
    assert panel.count('"cg-message cg-user"') == 3 and panel.count('"cg-message cg-bot"') == 4


def test_only_the_last_turn_changes_and_undo_takes_one_away(notebook):
    shown = said(notebook, 'look("撤回")')
    steps = re.findall(r"^(.+?)：(\d) 项，最后一项是 (.*)$", shown, re.MULTILINE)
    assert [(name, count) for name, count, _ in steps] == [("一开始", "3"), ("重说", "3"), ("编辑", "3"), ("撤回", "2")]
    first, again, edited, _ = [last for *_, last in steps]
    assert first != again and "我在收拾行李" in edited
    assert re.search(r"两种说法： \['.+', '.+'\]", shown)


def test_the_two_prompts_differ_in_the_name_and_so_does_what_the_model_expects(notebook):
    with_name, _, without = said(notebook, "def prompt_text(").partition("【抽掉“小林”的历史】")
    assert "[客人]我叫小林" in with_name and "小林" not in without
    assert all(text.rstrip().endswith("[客人]我叫什么名字？\n[苏梦远]") for text in (with_name, without))
    answers = said(notebook, "def chances(")
    chances = [float(chance) for chance in re.findall(r"的概率：.* = ([\d.]+)%", answers)]
    assert 1000 < chances[0] / chances[1] < 10_000
    verdicts = re.findall(r"\] (.*)\n  回复里有“小林”：(True|False)", answers)
    assert [verdict for _, verdict in verdicts] == ["True", "False"]
    assert [str("小林" in reply) for reply, _ in verdicts] == [verdict for _, verdict in verdicts] and len(
        verdicts
    ) == 2


def test_a_longer_prompt_takes_longer_without_the_cache_and_hardly_with_it(notebook):
    rows = re.findall(
        r"prompt +([\d,]+) 个 token.*缓存 +([\d.]+) 毫秒，扔掉 +([\d.]+)", said(notebook, "talk.free_cache()")
    )
    tokens, kept, dropped = zip(*[(int(a.replace(",", "")), float(b), float(c)) for a, b, c in rows])
    assert len(rows) == 3 and list(tokens) == sorted(tokens) and list(dropped) == sorted(dropped)
    assert kept[2] - kept[0] < (dropped[2] - dropped[0]) / 4


def test_the_short_limit_cuts_and_a_small_context_drops_most_turns(notebook):
    shown = said(notebook, "for limit in (3, MAX_NEW_TOKENS)")
    assert re.search(r"3 +3 +False", shown) and "True" in shown and "[context full]" in shown
    turns, dropped = map(int, re.search(r"之前有 (\d+) 项，最早的 (\d+) 项", shown).groups())
    assert dropped > turns / 2


def test_a_reply_grows_while_the_cell_goes_on_and_stops_in_the_middle(notebook):
    shown = said(notebook, "session.begin(")
    running, *texts, end = shown.strip().splitlines()
    assert running.endswith("True")
    texts = [text.rstrip("\ufffd") for text in texts if text.strip()]  # half a character is shown as this sign
    assert len(texts) > 1 and all(longer.startswith(text) for text, longer in zip(texts, texts[1:]))
    tokens = int(re.search(r"写了 (\d+) 个 token，自己结束的：False，列表里留下 \['给我讲个故事吧', '.+'\]", end)[1])
    assert 12 <= tokens < 128


def test_the_facts_are_counted_as_the_replies_have_them(notebook):
    counts = re.findall(r"^(..的人设)：四个事实里说出了 (\d) 个 (\[.*\])$", said(notebook, "vague = "), re.MULTILINE)
    assert [title for title, *_ in counts] == ["空泛的人设", "具体的人设"]
    assert [(count, found) for _, count, found in counts] == [("0", "[]"), ("1", "['灯塔']")]
    vague, concrete = map(float, re.findall(r"“望潮岛”的概率：(\S+)", said(notebook, "vague = ")))
    assert 1e9 < concrete / vague < 1e10 and 2e-3 < concrete < 4e-3


def test_what_nano_finds_is_what_its_evaluation_says(notebook):
    found = json.loads((NANO_DIR / "evaluation.json").read_text(encoding="utf-8"))
    text = rules.markdown(notebook)
    assert (
        f"有历史时答对 {found['memory_with_history'] * 100:.0f} %，没有时 {found['memory_without_history']:.0f} %"
        in text
    )
    topics = ("name", "self", "place", "like", "job")
    name, itself, place, like, job = (int(100 * found[f"persona_{topic}"]) for topic in topics)
    assert f"答对名字 {name} %、自称 {itself} %、住处 {place} %，喜欢什么 {like} %，做什么的 {job} %" in text


def test_a_card_comes_back_out_of_its_picture(notebook):
    outputs = the_cell(notebook, "helpers.export_card_png(my_card").outputs
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "和原来一样： True" in said(notebook, "helpers.export_card_png(my_card")


def test_the_lists_of_two_characters_are_the_same_talk_half_an_entry_apart(notebook):
    first, second = re.split(r"\n +\n", said(notebook, "def facing("))
    ours, theirs = (
        [text for pair in re.findall(r"^ +(\[.*\])$", shown, re.MULTILINE) for text in ast.literal_eval(pair)]
        for shown in (first, second)
    )
    assert ours[0] == "" and ours[1:-1] == theirs and len(theirs) == 4
    duet = re.findall(r"^\[.+?\] (.*)$", said(notebook, "converse(model, tokenizer, speaker"), re.MULTILINE)
    assert len(duet) > 1 and duet[:5] == ours[1 : 1 + len(duet)]


def test_the_duet_ends_for_a_reason_and_the_four_lines_show_the_others(notebook):
    shown = said(notebook, "converse(model, tokenizer, speaker")
    assert re.search(r"停下的原因：(empty|repeated|goodbye|turns)\n", shown)
    assert re.findall(r"”：(\S+)", shown) == ["接着聊", "empty", "repeated", "goodbye"]


def test_a_restored_conversation_goes_on_alike_and_the_model_is_let_go(notebook):
    assert "相同：True" in said(notebook, "ChatSession.restore(")
    assert "模型已经不在内存里： True" in said(notebook, "watch() is None")
