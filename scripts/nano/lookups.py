"""Can the model look things up? Questions about personas and conversations whose answers it has never seen."""

import random

import helpers
from helpers.characters.personas import SessionMeta, load_characters

from .compose import MANNERS
from .everyday import Everyday, Slots
from .memory import Memory
from .personas import QUESTIONS, Personas

GREEDY = {"do_sample": False, "max_new_tokens": 60, "repetition_penalty": 1.0}
SMALL_TALK = ("今天天气真好", "你吃饭了吗", "我有点累了", "讲个笑话吧", "你在忙什么呢", "好的")


def persona_lookups(model, tokenizer, seed: int, count: int = 40) -> dict[str, list]:
    """For each topic of `QUESTIONS`: [right, question, reply, fact] for every persona, held out by name and value."""
    rng = random.Random(seed)
    personas = Personas(rng, Slots(evaluation=True), MANNERS)
    results = {topic: [] for topic in QUESTIONS}
    for _ in range(count):
        persona = personas.draw()
        for topic in QUESTIONS:
            question, *_ = personas.question(persona, topic)
            reply, _ = helpers.chat(model, tokenizer, persona.session, question, **GREEDY)
            fact = persona.facts[topic]
            results[topic].append([fact.strip("《》") in reply, question, reply, fact])
    return results


def memory_lookups(model, tokenizer, seed: int, count: int = 60) -> list[dict]:
    """What the user said one to three turns of small talk ago, asked for with the conversation and without it."""
    rng = random.Random(seed)
    memory = Memory(rng, Everyday(rng, Slots(evaluation=True)))
    cards, kinds = list(load_characters().values()), list(memory.kinds)
    results = []
    for number in range(count):
        card, kind = cards[number % len(cards)], kinds[number % len(kinds)]
        session = SessionMeta(**card.model_dump())
        words = {"bot": card.bot_name, "user": card.user_name, "self": "我"}
        (said, _), value = memory.statement(card.bot_name, kind, words)
        history = []
        for line in (said, *rng.sample(SMALL_TALK, rng.randint(1, 3))):
            _, history = helpers.chat(model, tokenizer, session, line, history, **GREEDY)
        question, *_ = memory.question(card.bot_name, kind, value, words)
        known, history = helpers.chat(model, tokenizer, session, question, history, **GREEDY)
        unknown, _ = helpers.chat(model, tokenizer, session, question, **GREEDY)
        results.append(
            {
                "value": value,
                "history": history,
                "with_history": value in known,
                "alone": value in unknown,
                "cut": unknown,
            }
        )
    return results
