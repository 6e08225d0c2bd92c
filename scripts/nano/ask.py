"""Let CharacterGLM-Nano answer a file of test lines, greedily and at its own sampling settings, for somebody to judge.

PYTHONPATH=scripts python -m nano.ask                  # data/nano/test_lines.jsonl; --json FILE keeps the replies
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

import helpers
from helpers.model.loading import NANO_DIR

from .everyday import read_rows


def answer(model, tokenizer, rows: list[dict], seed: int = 0) -> list[dict]:
    """Each row with the replies "greedy" and "sampled"; rows whose character is not a shipped one are left out."""
    cards, answered = helpers.load_characters(), []
    for number, row in enumerate(row for row in rows if row["character"] in cards):
        card = cards[row["character"]]
        greedy, _ = helpers.chat(model, tokenizer, card, row["line"], do_sample=False, max_new_tokens=80)
        sampled, _ = helpers.chat(model, tokenizer, card, row["line"], seed=seed + number, max_new_tokens=80)
        answered.append({**row, "greedy": greedy, "sampled": sampled})
    return answered


def main(
    model: str = "nano",
    lines: Path = NANO_DIR / "test_lines.jsonl",
    seed: int = 0,
    threads: int = 2,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print every line and its two replies."""
    torch.set_num_threads(threads)
    answered = answer(*helpers.load(model), read_rows(lines), seed)
    for row in answered:
        print(f"[{row['character']}] {row['line']}\n    {row['greedy']}\n    {row['sampled']}")
    if json_file:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answered)
        json_file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
