"""data/everyday and the rows that training makes of it: complete, without duplicates, and without the test's answers."""

import json
import random
import re
from collections import Counter

import pytest
import torch
from nano.compose import Composer
from nano.everyday import EVERYDAY, Slots, held_out, read_rows, vary
from nano.lookups import QUESTIONS
from nano.model import new_model, take_weights
from nano.personas import Personas
from nano.rows import Row, to_batch
from nano.tokenizer import LineEncoder

import helpers
from helpers.characters.dialogues import load_dialogues
from helpers.model.loading import NANO_DIR

SLOT = re.compile(r"\{(\w+)\}")
PERSONA_SLOTS = {"bot", "user", "self", "job", "place_bot", "like", "habit", "trait"}
LINES = {row["intent"]: row["lines"] for row in read_rows(EVERYDAY / "lines.jsonl")}
REPLIES = [row for file in sorted((EVERYDAY / "replies").glob("*.jsonl")) for row in read_rows(file)]
VOICES = read_rows(EVERYDAY / "voices.jsonl")
DUETS = read_rows(EVERYDAY / "duets.jsonl")
TOPICS = read_rows(EVERYDAY / "topics.jsonl")
OPENERS = read_rows(EVERYDAY / "openers.jsonl")


def plain(text: str) -> str:
    """Without punctuation, spaces and slots."""
    return re.sub(r"\{\w+\}|\W|_", "", text)


@pytest.fixture(scope="module")
def tokenizer():
    return helpers.load("nano")[1]


@pytest.fixture(scope="module")
def composer(tokenizer) -> Composer:
    dialogues = [dialogue for dialogue in load_dialogues() if not dialogue.held_out]
    return Composer(LineEncoder(tokenizer), dialogues, random.Random(0))


def test_every_character_and_voice_answers_every_intent():
    answered = Counter(row.get("character") or row["voice"] for row in REPLIES + VOICES)
    assert len(answered) == 14 + 6 and set(answered.values()) == {len(LINES)}
    assert {row["intent"] for row in REPLIES + VOICES} == set(LINES)
    assert {row["character"] for row in REPLIES} == set(helpers.load_characters())


def test_no_line_belongs_to_two_intents_and_no_reply_stands_twice():
    lines = Counter(line.rstrip("。！？!?") or line for lines in LINES.values() for line in lines)
    assert [line for line, number in lines.items() if number > 1] == []
    replies = Counter((row.get("character") or row["voice"], t) for row in REPLIES + VOICES for t in row["replies"])
    assert [reply for reply, number in replies.items() if number > 1] == []


def test_topics_are_at_least_sixty_a_character_and_said_nowhere_else():
    topics = Counter(row["character"] for row in TOPICS)
    assert topics.keys() == helpers.load_characters().keys() and min(topics.values()) >= 60
    assert all(5 <= len(row["lines"]) <= 8 and 8 <= len(row["reply"]) <= 45 for row in TOPICS)
    lines = Counter((row["character"], line.rstrip("。！？!?")) for row in TOPICS for line in row["lines"])
    assert [line for line, number in lines.items() if number > 1] == []
    everybody = {line.rstrip("。！？!?") for lines in LINES.values() for line in lines}
    assert not everybody & {line for _, line in lines}
    replies = {reply for row in REPLIES for reply in row["replies"]} | {row["reply"] for row in TOPICS}
    assert len(replies) == sum(len(row["replies"]) for row in REPLIES) + len(TOPICS)
    assert not re.search(r"[{}]", "".join("".join(row["lines"]) + row["reply"] for row in TOPICS))


def test_openers_are_those_of_the_cards_and_have_one_answer():
    cards = helpers.load_characters()
    assert [(row["character"], row["lines"][0]) for row in OPENERS] == [
        (name, opener) for name, card in cards.items() for opener in card.openers
    ]
    lines = Counter((row["character"], line.rstrip("。！？!?")) for row in OPENERS for line in row["lines"])
    assert [line for line, number in lines.items() if number > 1] == []
    topics = {(row["character"], line.rstrip("。！？!?")): row["reply"] for row in TOPICS for line in row["lines"]}
    assert not topics.keys() & lines.keys()


def test_lines_and_replies_have_a_sensible_length():
    assert all(
        1 <= len(line) <= (130 if intent == "long_line" else 60) for intent, lines in LINES.items() for line in lines
    )
    assert all(8 <= len(reply) <= 45 for row in REPLIES + VOICES for reply in row["replies"])
    assert all(6 <= len(line) <= 45 for row in DUETS for line in row["lines"])


def test_slots_of_a_reply_are_in_every_line_of_its_intent():
    for row in REPLIES + VOICES:
        allowed = PERSONA_SLOTS if "voice" in row else {"bot", "user"}
        needed = {slot for reply in row["replies"] for slot in SLOT.findall(reply)} - allowed
        assert all(needed <= set(SLOT.findall(line)) for line in LINES[row["intent"]]), row["intent"]


def test_every_pair_of_characters_has_two_duets_of_eight_lines():
    pairs = Counter(frozenset((row["a"], row["b"])) for row in DUETS)
    assert len(pairs) == 14 * 13 // 2 and set(pairs.values()) == {2}
    assert {len(row["lines"]) for row in DUETS} == {8}
    assert all(row["a"] != row["b"] and {row["a"], row["b"]} <= set(helpers.load_characters()) for row in DUETS)


def test_nothing_of_the_lora_set_is_in_training():
    lora = [
        json.loads(line)
        for line in (EVERYDAY.parent / "lora" / "lu_zhishen.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    texts = {text for row in REPLIES + VOICES for text in row["replies"]} | {t for row in DUETS for t in row["lines"]}
    assert not texts & {row["output"] for row in lora}
    everything = "".join(file.read_text(encoding="utf-8") for file in EVERYDAY.rglob("*.json*"))
    assert not re.search("鲁智深|洒家|林冲", everything)


def test_no_test_line_is_in_training():
    known = {plain(line) for lines in (*LINES.values(), *(row["lines"] for row in TOPICS + OPENERS)) for line in lines}
    known |= {plain(query) for dialogue in load_dialogues() for query, _ in dialogue.history if query}
    for name in ("parts.json", "memory.json"):
        known |= {plain(text) for text in re.findall(r'"([^"]+)"', (EVERYDAY / name).read_text(encoding="utf-8"))}
    leaked = [row["line"] for row in read_rows(NANO_DIR / "test_lines.jsonl") if plain(row["line"]) in known]
    assert leaked == []


def test_a_meaning_stands_where_its_reply_begins(composer, tokenizer):
    rows = [composer.character_row(256) for _ in range(8)]
    ids, _, begins, meanings = to_batch(rows, 256, composer.meanings)
    names = {number: meaning for meaning, number in composer.meanings.items()}
    assert len(begins) == len(meanings) > 8
    for begin, number in zip(begins.tolist(), meanings.tolist()):
        text = tokenizer.decode(ids.flatten()[begin - 200 if begin % 256 >= 200 else begin - begin % 256 : begin + 1])
        said = plain(re.sub(r"^\[.*?\]", "", text.rstrip("\n").split("\n")[-2]))
        assert text.endswith("]") and said, "at the end of the name, behind what was said"
        known = [plain(line) for line in composer.everyday.lines.get(names[number], [])]
        assert not known or max(len(set(said) & set(line)) / len(set(line)) for line in known if line) > 0.5


def test_a_wider_network_begins_as_the_narrow_one_was(tokenizer):
    narrow, wide = new_model(tokenizer, layers=2, width=64, mlp=96), new_model(tokenizer, layers=2, width=64, mlp=160)
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        take_weights(wide, narrow)
        assert torch.allclose(wide(ids).logits, narrow(ids).logits, atol=1e-6)
    wide(ids).logits.square().sum().backward()
    assert all(layer.mlp.down_proj.weight.grad[:, 96:].any() for layer in wide.model.layers), (
        "the new neurons can learn"
    )


def test_held_out_values_never_occur_in_training_rows(composer, tokenizer):
    texts = [tokenizer.decode(row.ids) for row in (composer.persona_row(512) for _ in range(60))]
    # The bot's name from its own line: a name may have 和 in it.
    names = {re.search(r"以下是一段(.+)和(.+)之间的对话。\n关于\1的信息", text).groups() for text in texts}
    assert len(names) == 60 and not any(held_out(name) for pair in names for name in pair)
    unseen, seen = Slots(evaluation=True), Slots()
    assert all(not set(unseen.values[slot]) & set(seen.values[slot]) for slot in seen.values)
    assert all(len(unseen.values[slot]) >= 8 for slot in unseen.values)


def test_evaluation_personas_state_the_facts_that_are_asked_for():
    personas = Personas(random.Random(3), Slots(evaluation=True), {"": ""})
    for persona in (personas.draw() for _ in range(40)):
        assert all(held_out(persona.facts[topic]) for topic in QUESTIONS)
        assert all(persona.facts[topic] in persona.session.bot_info for topic in QUESTIONS)


def test_a_row_is_token_for_token_the_prompt_of_inference(tokenizer):
    encoder = LineEncoder(tokenizer)
    for dialogue in load_dialogues()[::50]:
        row, asked = Row.begin(encoder, dialogue.card), [turn for turn in dialogue.history if turn[0]]
        for greeting in (reply for query, reply in dialogue.history if not query):
            assert row.add(encoder, dialogue.card, 2048, "", greeting)
        begun = len(row.ids)
        assert all(row.add(encoder, dialogue.card, 2048, query, reply) for query, reply in asked)
        expected = tokenizer.apply_chat_template(
            dialogue.messages, session_meta=dialogue.card, return_assistant_tokens_mask=True
        )
        assert row.ids == expected["input_ids"]
        learnt, mask = [position + 1 for position in row.learnt], expected["assistant_masks"]
        assert min(learnt) >= begun, "a greeting answers nothing"
        assert {i for i, in_reply in enumerate(mask) if in_reply and i >= begun} <= set(learnt)
        names = tokenizer.decode([row.ids[i] for i in learnt if not mask[i]])  # the name is learnt before each reply
        assert names == f"{dialogue.card.bot_name}]" * len(asked)


def test_rows_fit_their_length_and_are_the_same_for_the_same_seed(composer, tokenizer):
    for broad, size, least, most in ((10**9, 6144, 0.8, 1), (0, 3072, 0.2, 0.6)):
        ids, positions, *_ = next(composer.batches(broad))
        assert ids.numel() == size and least < len(positions) / size < most
        assert (ids.flatten()[positions + 1] != 0).all()
    dialogues = [dialogue for dialogue in load_dialogues() if not dialogue.held_out]
    again = [next(Composer(LineEncoder(tokenizer), dialogues, random.Random(7)).batches(10**9))[0] for _ in range(2)]
    assert again[0].equal(again[1])


def test_focused_training_knows_one_reply_for_each_line(composer):
    first = {key: texts[0] for key, texts in composer.everyday.by_intent.items()}
    composer.focus()
    for speaker, deck in composer.everyday.decks.items():
        assert len(deck.items) == len({intent for intent, _ in deck.items}) > 200
        assert all(first[speaker, intent] == text for intent, text in deck.items)


def test_a_value_in_a_line_survives_its_variations():
    lines = {vary("我今天吃了红烧肉", "李白", random.Random(seed), whole=True) for seed in range(200)}
    assert len(lines) > 10 and all("红烧肉" in line for line in lines)
    assert any("红烧肉" not in vary("我今天吃了红烧肉", "李白", random.Random(s), whole=False) for s in range(50))
