"""What fine-tuning changed: held-out perplexity, replies side by side, repetition, and falling out of character."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
import torch

from ..characters.dialogues import Dialogue, load_dialogues
from ..chat.chat import chat
from .compat import takes_any_mask
from .encoding import collate, count_learned, encode_samples, pad

ASSISTANT_TALK = ("语言模型", "人工智能助手", "AI助手", "作为一个AI")
REPEATED_LENGTH = 4  # characters
CHINESE = re.compile(r"[\u4e00-\u9fff]+")


@torch.no_grad()
def summed_loss(model, rows: list[dict], batch_size: int = 8) -> tuple[float, int]:
    """(sum of the losses of all learned tokens in nats, number of those tokens), the model in evaluation mode."""
    model.eval()
    batch_of = collate if takes_any_mask(model) else pad
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    total = 0.0
    for start in range(0, len(rows), batch_size):
        group = rows[start : start + batch_size]
        batch = {name: tensor.to(model.device) for name, tensor in batch_of(group).items()}
        total += count_learned(group) * model(**batch).loss.item()
    return total, count_learned(rows)


def perplexity(model, rows: list[dict], batch_size: int = 8) -> float:
    """exp of the mean loss of a learned token: among how many equally likely tokens the model hesitates."""
    total, count = summed_loss(model, rows, batch_size)
    return math.exp(total / count)


def perplexity_before_and_after(model, rows: list[dict]) -> tuple[float, float]:
    """Perplexity of the base and of the tuned model."""
    with model.disable_adapter():
        before = perplexity(model, rows)
    return before, perplexity(model, rows)


def base_ability(model, tokenizer, limit: int = 100) -> tuple[float, float]:
    """Perplexity before and after on held-out dialogues of the shipped characters: what tuning made the model forget."""
    held_out = [dialogue for dialogue in load_dialogues() if dialogue.held_out]
    step = max(1, len(held_out) // limit)  # spread over all characters
    return perplexity_before_and_after(model, encode_samples(tokenizer, held_out[::step]))


def count_words(replies: list[str]) -> Counter:
    """In how many replies each word is; a word is any 2 or 3 Chinese characters in a row."""
    counts = Counter()
    for reply in replies:
        runs = [(run, n) for run in CHINESE.findall(reply) for n in (2, 3)]
        words = [run[i : i + n] for run, n in runs for i in range(len(run) - n + 1)]
        counts.update(
            dict.fromkeys(words, 1)
        )  # not a set: of equally frequent words, the first in the text comes first
    return counts


def signature_words(replies: list[str], everybody: Counter, size: int, count: int = 4) -> list[str]:
    """The words by which a character is known, the most frequent first.

    They are in at least 3 % of its replies, and there 20 times as often as in those of others; `everybody` has the words
    of all `size` replies, its own included. One that hardly ever comes without a more frequent one is left out.
    """
    words: list[str] = []
    covered: set[int] = set()
    for word, times in count_words(replies).most_common():
        others = (everybody[word] - times) / max(1, size - len(replies))
        if times / len(replies) < max(0.03, 20 * others):
            continue
        found = {number for number, reply in enumerate(replies) if word in reply}
        if len(found - covered) > 0.1 * len(found):
            words.append(word)
            covered |= found
    return words[:count]


def repeats_itself(reply: str) -> bool:
    """Whether some 4 characters in a row occur twice in the reply."""
    runs = [reply[i : i + REPEATED_LENGTH] for i in range(len(reply) - REPEATED_LENGTH + 1)]
    return len(set(runs)) < len(runs)


def distinct_2(replies: Iterable[str]) -> float:
    """Different pairs of neighbouring characters, as a share of all pairs in the replies; 1 is the most varied."""
    pairs = [reply[i : i + 2] for reply in replies for i in range(len(reply) - 1)]
    return len(set(pairs)) / max(1, len(pairs))


@dataclass(frozen=True)
class Voice:
    """How to tell a character by its replies.

    A reply is in voice if it contains one of `own_words`. It breaks character if it contains a word of somebody else
    (`other_words`) or talks like an assistant. A reply may be neither: plain words that anybody could say.
    """

    own_words: tuple[str, ...]
    other_words: tuple[str, ...]

    @classmethod
    def learn(cls, bot_name: str, replies: list[str]) -> "Voice":
        """From the character's training replies and the dialogues of the shipped characters."""
        said = defaultdict(list)
        for dialogue in load_dialogues():
            if dialogue.card.bot_name != bot_name:
                said[dialogue.card.bot_name] += [reply for _, reply in dialogue.history]
        everybody = [reply for texts in said.values() for reply in texts]
        counts, theirs = count_words(everybody), []
        for name, texts in said.items():
            theirs += [f"我是{name}", *signature_words(texts, counts, len(everybody))]
        own = signature_words(replies, counts + count_words(replies), len(everybody) + len(replies))
        return cls(tuple(own), tuple(word for word in theirs if not any(word in reply for reply in replies)))

    def in_voice(self, reply: str) -> bool:
        return any(word in reply for word in self.own_words)

    def breaks_character(self, reply: str) -> bool:
        return any(word in reply for word in (*self.other_words, *ASSISTANT_TALK))


@dataclass(frozen=True)
class Comparison:
    """Replies of base and tuned model to the same held-out lines; a table in a notebook."""

    voice: Voice
    lines: list[tuple[str, str, str, str]]  # what the user says, the reply in the data, the base's, the tuned model's

    def counts(self) -> dict[str, dict[str, float]]:
        """For "data", "base" and "tuned": replies in voice, breaking character, repeating themselves, distinct-2 of all.

        The replies of the data are the measure: a tuned model that is in voice more often than they are overdoes it.
        """
        _, data, base, tuned = zip(*self.lines)
        return {
            name: {
                "replies": len(replies),
                "in_voice": sum(map(self.voice.in_voice, replies)),
                "breaks_character": sum(map(self.voice.breaks_character, replies)),
                "repeats_itself": sum(map(repeats_itself, replies)),
                "distinct_2": round(distinct_2(replies), 3),
            }
            for name, replies in (("data", data), ("base", base), ("tuned", tuned))
        }

    def _repr_html_(self) -> str:
        titles = ["用户", "数据里的回答", "微调前 base", "微调后 tuned"]
        with pd.option_context("display.max_colwidth", None):  # it would cut what is longer than 50 characters
            return pd.DataFrame(self.lines, columns=titles).to_html(index=False, justify="left")

    def __repr__(self) -> str:
        return "\n".join(
            f"[用户] {q}\n  数据：{want}\n  base：{base}\n  tuned：{tuned}" for q, want, base, tuned in self.lines
        )


def compare(model, tokenizer, dialogues: list[Dialogue], voice: Voice, *, seed: int = 0, **generation) -> Comparison:
    """What base and tuned model answer to the last line of each dialogue, line i with seed `seed + i` on both sides."""
    lines = []
    for position, dialogue in enumerate(dialogues):
        query, wanted = dialogue.history[-1]
        options = {"history": dialogue.history[:-1], "seed": seed + position, **generation}
        with model.disable_adapter():
            base, _ = chat(model, tokenizer, dialogue.card, query, **options)
        tuned, _ = chat(model, tokenizer, dialogue.card, query, **options)
        lines.append((query, wanted, base, tuned))
    return Comparison(voice, lines)
