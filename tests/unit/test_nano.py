"""CharacterGLM-Nano keeps what its model card promises. Measured again here, with the script the card quotes."""

import json
import re

import pytest
from nano.evaluate import SCRIPTED_QUESTIONS, evaluate
from nano.everyday import EVERYDAY, address, read_rows

import helpers
from helpers.model.loading import NANO_DIR

EVALUATION = json.loads((NANO_DIR / "evaluation.json").read_text(encoding="utf-8"))
# What the model must reach; the card quotes what it does reach.
FLOORS = {"duet_right_voice": 0.9}
LOOKUPS = ("persona_name", "persona_job", "persona_like", "persona_place", "persona_self", "memory_with_history")
QUOTED = (*FLOORS, *LOOKUPS, "memory_without_history", "verbatim_share", "ended_by_itself", "distinct_greetings")


@pytest.fixture(scope="module")
def figures() -> dict:
    return evaluate(*helpers.load("nano"), seed=0)


def test_files_are_the_original_layout_and_small():
    names = {file.name for file in NANO_DIR.iterdir()}
    assert {"config.json", "tokenizer.model", "pytorch_model.bin.index.json"} <= names
    assert {f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)} <= names
    assert sum(file.stat().st_size for file in NANO_DIR.iterdir()) <= 25_000_000


def test_newline_is_id_13_and_control_tokens_follow_the_pieces():
    _, tokenizer = helpers.load("nano")
    assert tokenizer.convert_ids_to_tokens(13) == "<0x0A>"
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    pieces = len(tokenizer) - 5
    expected = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]
    assert tokenizer.convert_ids_to_tokens(list(range(pieces, pieces + 5))) == expected


def test_a_piece_has_at_most_two_characters():
    _, tokenizer = helpers.load("nano")
    pieces = [piece for piece in tokenizer.get_vocab() if not re.fullmatch(r"<.+>|\[.+\]", piece)]
    assert max(len(piece) for piece in pieces) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOORS)
def test_voices_reach_their_floor(figures, name):
    assert figures[name] >= FLOORS[name]


@pytest.mark.slow
def test_the_first_lines_that_the_page_offers_get_the_answer_written_for_them():
    model, tokenizer = helpers.load("nano")
    cards, right = helpers.load_characters(), []
    for row in read_rows(EVERYDAY / "openers.jsonl"):
        card = cards[row["character"]]
        reply, _ = helpers.chat(model, tokenizer, card, row["lines"][0], [["", card.greeting]], seed=0)
        right.append(reply == row["reply"].replace("{user}", address(card, card.user_name)))
    assert len(right) == 42 and sum(right) >= 38


@pytest.mark.slow
def test_without_the_conversation_nothing_is_remembered(figures):
    assert figures["memory_without_history"] <= 0.1


@pytest.mark.slow
def test_replies_end_by_themselves(figures):
    assert figures["held_out_lines"] == figures["ended_by_itself"] == 100


@pytest.mark.slow
def test_characters_answer_one_greeting_differently(figures):
    assert len(figures["greetings"]) == 14
    assert figures["distinct_greetings"] >= 13


@pytest.mark.slow
def test_scripted_questions_get_different_answers(figures):
    queries, replies = zip(*figures["scripted_conversation"])
    assert queries == SCRIPTED_QUESTIONS
    assert all(len(reply) >= 4 for reply in replies) and len(set(replies)) == 3


@pytest.mark.slow
def test_card_and_evaluation_agree_with_what_is_measured(figures):
    card = (NANO_DIR / "README.md").read_text(encoding="utf-8")
    for name in QUOTED:
        assert figures[name] == pytest.approx(EVALUATION[name], rel=0.05, abs=0.02), name
        (quoted,) = re.findall(rf"`{name}` \| ([\d.]+)", card)
        assert float(quoted) == pytest.approx(EVALUATION[name], abs=0.005), name


def test_test_lines_ask_every_character_everything():
    rows = read_rows(NANO_DIR / "test_lines.jsonl")
    for name in helpers.load_characters():
        kinds = [row["kind"] for row in rows if row["character"] == name]
        assert len(set(kinds)) >= 12 and kinds.count("free") >= 9, name


def test_training_log_says_how_long_it_took():
    log = json.loads((NANO_DIR / "training_log.json").read_text())
    assert log["cpu_seconds"] == sum(part["cpu_seconds"] for part in log["rounds"])
    for part in log["rounds"]:
        assert part["log"][-1]["tokens"] == part["tokens"]
        assert part["log"][-1]["loss"] < part["log"][0]["loss"]


def test_every_notebook_says_what_nano_is():
    for notebook in (NANO_DIR.parents[1] / "notebooks").glob("*.ipynb"):
        assert "教学替身" in notebook.read_text(encoding="utf-8"), notebook.name
