"""Small personas put together from parts, with questions that only their own text can answer."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from helpers.characters.personas import SessionMeta

from .everyday import EVERYDAY, Slots, held_out

QUESTIONS = ("name", "job", "place", "like", "self")  # those that the evaluation asks; "habit" is asked in training


@dataclass
class Persona:
    """A generated character: the session it speaks in, and the facts its text states."""

    session: SessionMeta
    facts: dict[str, str]
    voice: str = ""


class Personas:
    """Generator of personas; its values are those of training, or those held out."""

    def __init__(self, rng: random.Random, slots: Slots, voices: dict[str, str], directory: Path = EVERYDAY):
        self.rng, self.slots, self.voices = rng, slots, voices
        self.parts = json.loads((directory / "parts.json").read_text(encoding="utf-8"))

    def draw(self) -> Persona:
        """A new persona."""
        rng, parts = self.rng, self.parts
        facts = {
            "name": self.slots.name(rng),
            "job": self._fresh(self._job),
            "place": self._fresh(self._place),
            "like": self._fresh(self._like),
            "habit": self._fresh(lambda: rng.choice(parts["habits"])),
            "self": self._fresh(self._self_word),
            "trait": rng.choice(parts["traits"]),
        }
        voice = rng.choice(sorted(self.voices)) if self.voices else ""
        infos = parts["plain_infos"] if facts["self"] == "我" else parts["infos"]
        info = self._fill(rng.choice(infos), facts) + (self.voices[voice] if voice else "")
        session = SessionMeta(bot_name=facts["name"], bot_info=info, user_name=self.slots.name(rng), user_info="")
        if rng.random() < 0.3:
            session.user_info = self._user_info(session)
        return Persona(session, facts, voice)

    def question(self, persona: Persona, topic: str = "") -> list[str]:
        """[question, answer, topic] about one fact of the persona."""
        topic = topic or self.rng.choice((*QUESTIONS, "habit"))
        answer = self._fill(self.rng.choice(self.parts["answers"][topic]), persona.facts)
        return [self.rng.choice(self.parts["questions"][topic]), answer, topic]

    def _fresh(self, draw) -> str:
        """A value on the right side of the hold-out. 我 is of neither side: most people call themselves that."""
        while True:
            value = draw()
            if held_out(value) == self.slots.evaluation or (value == "我" and not self.slots.evaluation):
                return value

    def _fill(self, template: str, facts: dict[str, str]) -> str:
        return template.format(**facts)

    def _job(self) -> str:
        if self.rng.random() < 0.4:
            return self.slots.draw("job", self.rng)
        verb = self.rng.choice(list(self.parts["trade_verbs"]))
        what = self._known_or_invented(self.parts["trade_verbs"][verb])
        return verb + what + "的" + self.rng.choice(self.parts["trade_tails"])

    def _place(self) -> str:
        if self.rng.random() < 0.2:
            return self.slots.draw("place", self.rng)
        return self._known_or_invented(self.parts["place_heads"]) + self.rng.choice(self.parts["place_tails"])

    def _known_or_invented(self, values: list[str]) -> str:
        if self.rng.random() < self.slots.invented_share:
            return self.slots.invented(self.rng)
        return self.rng.choice(values)

    def _like(self) -> str:
        verb, slot = self.rng.choice(list(self.parts["likes_heads"].items()))
        return verb + self.slots.draw(slot, self.rng) + ("》" if verb.endswith("《") else "")

    def _self_word(self) -> str:
        if self.rng.random() < 0.4:
            return self.rng.choice(self.parts["self_words"])
        head = self.rng.choice(self.parts["self_heads"].split())
        tail = self.slots.surnames if head == "老" else self.slots.given
        return head + self.rng.choice(tail)

    def _user_info(self, session: SessionMeta) -> str:
        rng, parts = self.rng, self.parts
        facts = {"name": session.user_name, "bot": session.bot_name, "relation": rng.choice(parts["relations"])}
        facts |= {
            "trait": rng.choice(parts["traits"]),
            "job": self._job(),
            "place": self._place(),
            "like": self._like(),
        }
        return self._fill(rng.choice(parts["user_infos"]), facts)
