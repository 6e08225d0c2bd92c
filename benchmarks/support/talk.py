"""What the models of the benchmarks are asked, and a clock for what they answer."""

import time
from collections.abc import Callable

import torch
from transformers.generation import BaseStreamer

from helpers.characters.dialogues import load_dialogues
from helpers.chat.fitting import encode_prompt

CHARACTER = "苏梦远"


def queries(character: str | None = None) -> list[str]:
    """What real users say in the shipped dialogues, to one character or to all."""
    dialogues = [dialogue for dialogue in load_dialogues() if character in (None, dialogue.card.bot_name)]
    return [query for dialogue in dialogues for query, _ in dialogue.history if query]


def prompts(tokenizer, count: int) -> list[list[int]]:
    """The ids of the prompts for the last replies of the first dialogues."""
    dialogues = load_dialogues()[:count]
    return [encode_prompt(tokenizer, d.card, d.history[-1][0], d.history[:-1]) for d in dialogues]


def random_ids(rows: int, tokens: int) -> torch.Tensor:
    """Token ids [rows, tokens] that both Nano and the 6B have, without control tokens."""
    return torch.randint(300, 4000, (rows, tokens), generator=torch.Generator().manual_seed(0))


def token_rate(tokenizer, texts: list[str], seconds: float) -> float:
    """Tokens a second, counted by encoding the replies again, in the same way for every side; each has one more, its end."""
    return sum(len(tokenizer.encode(text, add_special_tokens=False)) + 1 for text in texts) / seconds


class Clock(BaseStreamer):
    """Notes when tokens came, and how many."""

    def __init__(self, read: Callable[[], float] = time.perf_counter) -> None:
        self.read, self.ticks = read, []

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt, then with new tokens."""
        self.ticks.append((self.read(), value.numel()))

    def end(self) -> None:
        """Called by `generate` at the end."""

    def speed(self) -> float:
        """Tokens per second after the first new ones, which come from reading the prompt."""
        (begin, _), *later = self.ticks[1:]
        return sum(count for _, count in later) / (later[-1][0] - begin)
