"""CharacterGLM-Nano keeps what its model card promises. Measured again here, with the script the card quotes."""

import json
import re
from pathlib import Path

import pytest
from evaluate_nano import SCRIPTED_QUESTIONS, evaluate

import helpers
from helpers.model.loading import NANO_DIR

EVALUATION = json.loads((NANO_DIR / "evaluation.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def figures() -> dict:
    return evaluate(*helpers.load("nano"), seed=0)


def test_files_are_the_original_layout_and_small():
    names = {file.name for file in NANO_DIR.iterdir()}
    assert {"config.json", "tokenizer.model", "pytorch_model.bin.index.json"} <= names
    assert {f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)} <= names
    assert sum(file.stat().st_size for file in NANO_DIR.iterdir()) <= 12_000_000


def test_newline_is_id_13_and_control_tokens_follow_the_pieces():
    _, tokenizer = helpers.load("nano")
    assert tokenizer.convert_ids_to_tokens(13) == "<0x0A>"
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    pieces = len(tokenizer) - 5
    expected = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]
    assert tokenizer.convert_ids_to_tokens(list(range(pieces, pieces + 5))) == expected


def test_held_out_perplexity_is_far_below_the_unigram_baseline(figures):
    assert figures["held_out_perplexity"] < figures["unigram_perplexity"] / 4


def test_replies_end_by_themselves(figures):
    assert figures["held_out_lines"] == 100
    assert figures["ended_by_itself"] >= 95


def test_characters_answer_one_greeting_differently(figures):
    assert figures["greeted_characters"] == 8
    assert figures["distinct_greetings"] >= 7


def test_scripted_questions_get_different_answers(figures):
    queries, replies = zip(*figures["scripted_conversation"])
    assert queries == SCRIPTED_QUESTIONS
    assert all(len(reply) >= 4 for reply in replies) and len(set(replies)) == 3


def test_card_and_evaluation_agree_with_what_is_measured(figures):
    for name in ("held_out_perplexity", "unigram_perplexity"):
        assert figures[name] == pytest.approx(EVALUATION[name], rel=0.02)
    card = (NANO_DIR / "README.md").read_text(encoding="utf-8")
    for name in ("held_out_perplexity", "unigram_perplexity", "ended_by_itself", "distinct_greetings"):
        (quoted,) = re.findall(rf"`{name}` \| ([\d.]+)", card)
        assert float(quoted) == pytest.approx(EVALUATION[name], abs=0.05), name


def test_training_log_is_of_these_dialogues():
    from helpers.characters.dialogues import load_dialogues

    log = json.loads((NANO_DIR / "training_log.json").read_text())
    held_out = sum(dialogue.held_out for dialogue in load_dialogues())
    assert log["dialogues"]["held_out"] == held_out
    assert log["training_seconds"] < 3600


def test_every_notebook_says_what_nano_is():
    for notebook in (Path(__file__).parents[2] / "notebooks").glob("*.ipynb"):
        assert "教学替身" in notebook.read_text(encoding="utf-8"), notebook.name
