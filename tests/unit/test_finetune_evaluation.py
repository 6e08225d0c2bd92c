"""Evaluation: perplexity that does not depend on batching, and counts whose meaning is spelled out."""

import math

import pytest
import torch

import helpers
from helpers.characters.dialogues import Dialogue, load_dialogues
from helpers.finetune import (
    Voice,
    add_lora,
    base_ability,
    compare,
    encode_samples,
    load_samples,
    perplexity,
    perplexity_before_and_after,
    plot_losses,
    read_card,
    split_samples,
)
from helpers.finetune.command import DEFAULT_CARD, DEFAULT_DATA
from helpers.finetune.encoding import IGNORED
from helpers.finetune.evaluation import Comparison, count_words, distinct_2, repeats_itself, signature_words

OTHERS = ["今天天气很好。", "我们去看书吧，书在桌上。", "（笑）你来了。"] * 20


@pytest.fixture(scope="module")
def nano():
    return helpers.load("nano", dtype="float32")


@pytest.fixture(scope="module")
def samples():
    return split_samples(load_samples(DEFAULT_DATA, read_card(DEFAULT_CARD))[0])


@pytest.fixture
def tuned(nano):
    """A model with an adapter that changes something."""
    torch.manual_seed(0)
    model = add_lora(helpers.load("nano", dtype="float32")[0])
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


# --- perplexity


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_perplexity_is_that_of_every_row_alone(nano, samples, batch_size):
    model, tokenizer = nano
    rows = encode_samples(tokenizer, samples[1][:7])
    total = count = 0
    with torch.no_grad():
        for row in rows:
            learned = sum(label != IGNORED for label in row["labels"])
            loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.item()
            total, count = total + learned * loss, count + learned
    assert perplexity(model, rows, batch_size) == pytest.approx(math.exp(total / count), rel=1e-5)


def test_before_is_the_base_and_after_the_adapter(nano, tuned, samples):
    rows = encode_samples(nano[1], samples[1][:5])
    before, after = perplexity_before_and_after(tuned, rows)
    assert before == pytest.approx(perplexity(nano[0], rows), rel=1e-5)
    assert abs(after - before) > 1


def test_perplexity_switches_dropout_off(tuned, nano, samples):
    rows = encode_samples(nano[1], samples[1][:5])
    tuned.train()
    assert perplexity(tuned, rows) == perplexity(tuned, rows)


def test_base_ability_is_measured_on_held_out_dialogues(nano, tuned):
    before, after = base_ability(tuned, nano[1], limit=20)
    assert 10_000 < before < 50_000  # Nano knows its own lines by heart, and these are not among them
    assert after > before


# --- what is counted


def test_signature_words_are_what_others_do_not_say():
    replies = ["洒家来了。", "洒家正要喝酒。", "兄弟莫怕，今天洒家在。", "今天好。"] * 10
    words = signature_words(replies, count_words(OTHERS + replies), len(OTHERS + replies))
    assert words[0] == "洒家"
    assert "今天" not in words  # others say it too
    assert "家来" not in words and "家正" not in words  # pieces that only come with a better word


def test_voice_of_the_shipped_set(samples):
    replies = [sample.history[-1][1] for sample in samples[0]]
    voice = Voice.learn("鲁智深", replies)
    assert voice.own_words[0] == "洒家"
    assert voice.in_voice("洒家这就来。") and not voice.in_voice("我这就来。")
    for reply in ("俺老孙来也！", "我是阿九。", "船长，航线正常。", "作为一个AI，我不喝酒。"):
        assert voice.breaks_character(reply), reply
    assert not voice.breaks_character("洒家这就来。")
    assert not any(voice.breaks_character(reply) for reply in replies)  # by definition: words that he uses are his


def test_base_characters_are_recognised_as_others(samples):
    """The counter must not be blind: much of what the shipped characters say is not 鲁智深's."""
    voice = Voice.learn("鲁智深", [sample.history[-1][1] for sample in samples[0]])
    said = [reply for dialogue in load_dialogues() if dialogue.held_out for _, reply in dialogue.history]
    assert sum(map(voice.breaks_character, said)) > 0.2 * len(said)
    assert sum(map(voice.in_voice, said)) < 0.02 * len(said)


@pytest.mark.parametrize(
    ("reply", "repeats"), [("", False), ("好好好", False), ("好好好好好", True), ("我来了，你也来了", False), ("你去看看吧，再去看看", False), ("你再去看看，我再去看看", True)]
)  # fmt: skip
def test_repetition(reply, repeats):
    assert repeats_itself(reply) is repeats


def test_distinct_2():
    assert distinct_2(["甲乙丙"]) == 1
    assert distinct_2(["甲乙", "甲乙"]) == 0.5
    assert distinct_2(["", "甲"]) == 0


def test_comparison_counts_and_escapes():
    voice = Voice(("洒家",), ("老孙",))
    lines = [("<b>问</b>", "答", "老孙在此", "洒家在此，洒家在此"), ("q", "w" * 99, "<img src=x>", "洒家")]
    comparison = Comparison(voice, lines)
    counts = comparison.counts()
    assert counts["base"] == {"replies": 2, "in_voice": 0, "breaks_character": 1, "repeats_itself": 0, "distinct_2": 1}
    assert (counts["tuned"]["in_voice"], counts["tuned"]["repeats_itself"]) == (2, 1)
    assert (counts["data"]["replies"], counts["data"]["in_voice"], counts["data"]["repeats_itself"]) == (2, 0, 1)
    page = comparison._repr_html_()
    assert "<b>" not in page and "<img" not in page and "&lt;img src=x&gt;" in page and "w" * 99 in page
    assert "tuned：洒家" in repr(comparison)


def test_compare_answers_the_same_line_with_the_same_seed(nano, tuned):
    card = read_card(DEFAULT_CARD)
    dialogues = [
        Dialogue("a", card, [["你好", "好"]]),
        Dialogue("b", card, [["", "来了？"], ["来了", "坐。"], ["渴了", "喝。"]]),
    ]
    panel = compare(tuned, nano[1], dialogues, Voice((), ()), seed=3, max_new_tokens=12)
    for position, ((query, wanted, base, tuned_reply), dialogue) in enumerate(zip(panel.lines, dialogues)):
        assert [query, wanted] == dialogue.history[-1]
        options = {"history": dialogue.history[:-1], "seed": 3 + position, "max_new_tokens": 12}
        assert base == helpers.chat(*nano, card, query, **options)[0]
        assert tuned_reply == helpers.chat(tuned, nano[1], card, query, **options)[0]
        assert tuned_reply != base


def test_curve_shows_both_losses():
    history = [
        {"step": 0, "eval_loss": 5.0},
        {"step": 1, "loss": 4.0},
        {"step": 2, "loss": 3.0},
        {"step": 2, "eval_loss": 4.0},
    ]
    (axis,) = plot_losses(history).axes
    assert {line.get_label(): list(line.get_xdata()) for line in axis.lines} == {"training": [1, 2], "held-out": [0, 2]}
