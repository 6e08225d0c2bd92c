"""Things the user says in passing and asks for later: the reply can only be read from the conversation."""

import json
import random
from pathlib import Path

from .everyday import EVERYDAY, Everyday


class Memory:
    """Writes statement, question and both kinds of answers in the voice of a character."""

    def __init__(self, rng: random.Random, everyday: Everyday, directory: Path = EVERYDAY):
        self.rng, self.everyday = rng, everyday
        parts = json.loads((directory / "memory.json").read_text(encoding="utf-8"))
        self.kinds, self.voices = parts["kinds"], parts["voices"]

    def voice(self, speaker: str) -> dict:
        """How `speaker` says that it remembers; generated personas share one way."""
        return self.voices.get(speaker, self.voices[""])

    def statement(self, speaker: str, kind: str, words: dict[str, str]) -> tuple[list[str], str]:
        """([what the user says, what the character answers], the value to remember)."""
        slot = self.kinds[kind]["slot"]
        value = self.everyday.slots.draw(slot, self.rng)
        intent = self.rng.choice(list(self.kinds[kind]["say"]))
        said = self.rng.choice(self.kinds[kind]["say"][intent]).format(v=value)
        reply = self.everyday.reply(speaker, intent, words | {slot: value}) if self.rng.random() < 0.7 else ""
        return [said, reply or self.voice(speaker)["noted"].format(v=value, **words)], value

    def question(self, speaker: str, kind: str, value: str, words: dict[str, str]) -> list[str]:
        """[question, answer, meaning]; without a value the character says that it was never told."""
        voice = self.voice(speaker)
        core = self.rng.choice(self.kinds[kind]["core"]).format(v=value, you=voice["you"])
        answer = self.rng.choice(voice["yes" if value else "no"]).format(core=core, **words)
        return [self.rng.choice(self.kinds[kind]["ask"]), answer, f"recall {kind}"]
