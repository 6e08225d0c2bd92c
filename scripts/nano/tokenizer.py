"""Nano's tokenizer: the format of CharacterGLM's (BPE, byte fallback, newline is id 13), with fewer and shorter pieces."""

import io
import json
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import sentencepiece

from helpers.model.tokenization import NEWLINE_ID

PIECES = 4084  # with 5 control tokens and padding to a multiple of 64: a vocabulary of 4096
LONGEST_PIECE = 2  # a clause as one token would teach a wrong idea of a token, and could not be copied in parts
FRAME = ["以下是一段和之间的对话。", "关于的信息：", "[", "]"]


def train_tokenizer(texts: Iterable[str], directory: Path) -> None:
    """Write `tokenizer.model` and its settings. Texts are taken line by line, so no piece reaches across a "]"."""
    texts = [*texts, *FRAME * 50]
    characters = Counter(character for text in texts for character in text)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,  # a file of its own would carry the path it was written to
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        max_sentencepiece_length=LONGEST_PIECE,
        # A character that occurs once or twice is spelled in bytes, so that the bytes learn something too.
        character_coverage=1 - sum(n for n in characters.values() if n <= 2) / characters.total(),
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "ChatGLMTokenizer", "remove_space": False, "do_lower_case": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


class LineEncoder:
    """Ids of single lines and parts of lines, remembered: training reads the same lines many times.

    No piece reaches across "]" or a newline, so the parts of a prompt may be encoded one by one.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.encode = lru_cache(maxsize=200_000)(self._encode)

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
        return ids[ids.index(NEWLINE_ID) + 1 :]  # the first piece of a text would be "▁"

    def first(self, text: str) -> list[int]:
        """Ids of the first line of a prompt, with the control tokens before it."""
        return self.tokenizer(text)["input_ids"]
