"""How fast is our tokenizer against SentencePiece itself?

Measured: tokens a second on the shipped dialogues, each rendered as a whole prompt: encoding one text a call, encoding
them in batches, and decoding one list of ids a call. Ours is the tokenizer as `helpers.load` gives it, with all that
transformers does around it; the other side is `SentencePieceProcessor`, in C++, on the same `tokenizer.model`. Sides in
alternation, medians. Ids and decoded texts must be the same on both sides.

The batches show what the parallel backend is worth: SentencePiece is given the same number of threads as torch has.

    python benchmarks/tokenizer.py
    python benchmarks/tokenizer.py --model models/CharacterGLM-6B
    python benchmarks/tokenizer.py --quick     # 500 dialogues
"""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from sentencepiece import SentencePieceProcessor
from support.report import JsonFile, Quick, publish
from support.rounds import Ratio, in_turns
from transformers import AutoTokenizer

import helpers
from helpers.characters.dialogues import load_dialogues

BATCH = 256


def main(
    model: Annotated[str, typer.Option(help="Whose vocabulary: nano, 6b or a folder.")] = "nano",
    repetitions: Annotated[int, typer.Option(min=3)] = 7,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    """Print tokens a second of both sides."""
    threads = torch.get_num_threads()
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # before the first batch: the threads of tokenizers
    directory = helpers.resolve_model(model)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    pieces = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    texts = prompts(tokenizer)[: 500 if quick else None]
    ids = pieces.encode(texts)
    seconds = measure(tasks(tokenizer, pieces, texts, ids, threads), repetitions)
    tokens = sum(map(len, ids))
    publish(
        "我们的 tokenizer 比 SentencePiece 快吗？How fast is our tokenizer against SentencePiece?",
        ["task", "SentencePiece, tokens/s", "ours, tokens/s"],
        [
            [task, *(f"{tokens / statistics.median(took):,.0f}" for took in sides.values())]
            for task, sides in seconds.items()
        ],
        ratios={task: Ratio.of(sides["theirs"], sides["ours"]) for task, sides in seconds.items()},
        setting=f"{len(texts):,} prompts of {tokens / len(texts):.0f} tokens, {Path(directory).name}'s vocabulary, "
        f"medians of {repetitions}",
        json_file=json_file,
    )


def prompts(tokenizer) -> list[str]:
    """Every shipped dialogue as the text that the model reads."""
    return [
        tokenizer.apply_chat_template(dialogue.messages, session_meta=dialogue.card, tokenize=False)
        for dialogue in load_dialogues()
    ]


def tasks(tokenizer, pieces, texts: list[str], ids: list[list[int]], threads: int) -> dict[str, dict[str, Callable]]:
    """What is timed, on both sides; what they return must be equal."""
    batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]

    def encode_batches() -> list[list[int]]:
        return [row for batch in batches for row in tokenizer(batch, add_special_tokens=False)["input_ids"]]

    return {
        "encode, one text a call": {
            "theirs": lambda: [pieces.encode(text) for text in texts],
            "ours": lambda: [tokenizer.encode(text, add_special_tokens=False) for text in texts],
        },
        f"encode, batches of {BATCH}": {
            "theirs": lambda: [row for batch in batches for row in pieces.encode(batch, num_threads=threads)],
            "ours": encode_batches,
        },
        "decode, one text a call": {
            "theirs": lambda: [pieces.decode(row) for row in ids],
            "ours": lambda: [tokenizer.decode(row) for row in ids],
        },
    }


def measure(tasks: dict[str, dict[str, Callable]], repetitions: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every task on both sides, round by round."""
    seconds = {}
    for task, sides in tasks.items():
        theirs, ours = (side() for side in sides.values())  # warm-up
        assert theirs == ours, f"{task}: the two sides differ"
        timed = {side: lambda _, do=do: time_of(do) for side, do in sides.items()}
        seconds[task] = in_turns(timed, range(repetitions))
    return seconds


def time_of(do: Callable) -> float:
    """Seconds."""
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
