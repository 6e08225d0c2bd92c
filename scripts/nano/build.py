"""Build CharacterGLM-Nano: tokenizer and weights from `data/dialogues/` and `data/everyday/`.

    make nano
    PYTHONPATH=scripts python -m nano.build --start data/nano --output-dir outputs/nano      # goes on from given weights
    PYTHONPATH=scripts python -m nano.build --broad 200000 --focus 100000 --output-dir outputs/nano    # a quick trial

Nano is a teaching stand-in for CharacterGLM-6B: the same architecture, file layout and prompt, a thousandth of the
size. It is to know its lines by heart, so it is trained until it fits them.
"""

import json
import random
import re
import shutil
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from original_layout import write_original_layout
from transformers import AutoTokenizer, GenerationConfig

import helpers
from helpers import load_characters
from helpers.characters.dialogues import load_dialogues
from helpers.chat.generation import STOP_IDS
from helpers.model.loading import NANO_DIR

from .compose import Composer
from .everyday import EVERYDAY, read_rows
from .model import new_model, take_weights
from .tokenizer import LineEncoder, train_tokenizer
from .training import Training

BROAD_TOKENS = 6_000_000  # everything, at a constant learning rate
FOCUS_TOKENS = 8_500_000  # one reply for each line, at a falling one
SAVE_EVERY = 1_000_000
SAMPLING = {"do_sample": True, "temperature": 0.35, "top_p": 0.9, "top_k": 100, "repetition_penalty": 1.0}


def training_dialogues() -> list:
    """The nine tenths of data/dialogues that are not held out."""
    return [dialogue for dialogue in load_dialogues() if not dialogue.held_out]


def training_texts() -> list[str]:
    """Every text that training can show, without slots."""
    texts = [text for d in training_dialogues() for entry in d.history for text in entry if text]
    for card in load_characters().values():
        texts += [text for text in (card.bot_name, card.user_name, card.bot_info, card.user_info) for _ in range(20)]
    for file in sorted(EVERYDAY.rglob("*.jsonl")):
        texts += [text for row in read_rows(file) for key in ("lines", "replies") for text in row.get(key, [])]
        texts += [row["reply"] for row in read_rows(file) if "reply" in row]
    for file in sorted(EVERYDAY.glob("*.json")):
        texts += strings(json.loads(file.read_text(encoding="utf-8")))
    return [re.sub(r"\{\w+\}", "", text) for text in texts]


def strings(value) -> list[str]:
    """All strings inside a JSON value, keys of objects left out."""
    if isinstance(value, str):
        return [value]
    return [text for item in (value.values() if isinstance(value, dict) else value) for text in strings(item)]


def prepare(work: Path, seed: int, broad_tokens: int, start: Path | None = None) -> tuple[Training, AutoTokenizer]:
    """A tokenizer in `work`, and a model with the stream of its training rows: fresh ones, or those of `start`."""
    torch.manual_seed(seed)
    if start:
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(start / name, work)
    else:
        train_tokenizer(training_texts(), work)
    (work / "config.json").write_text('{"model_type": "chatglm"}')
    tokenizer = AutoTokenizer.from_pretrained(work)
    composer = Composer(LineEncoder(tokenizer), training_dialogues(), random.Random(seed))
    return Training(new_model(tokenizer), composer.batches(broad_tokens), len(composer.meanings)), tokenizer


def write(training: Training, work: Path, log: dict) -> None:
    """Weights, settings and log, in CharacterGLM's original layout."""
    model = training.model
    tied = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(tied.detach().clone())  # two matrices again
    write_original_layout(model, work)
    model.lm_head.weight = tied
    GenerationConfig(**SAMPLING, max_new_tokens=512, eos_token_id=STOP_IDS, pad_token_id=0).save_pretrained(work)
    (work / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")


def main(
    output_dir: Path = NANO_DIR,
    broad: int = BROAD_TOKENS,
    focus: int = FOCUS_TOKENS,
    rate: Annotated[
        float, typer.Option(min=0.01, max=1, help="with --broad 0: of the full learning rate, where its fall begins")
    ] = 1.0,
    seed: int = 0,
    threads: int = 2,
    bfloat16: Annotated[
        bool, typer.Option(help="multiply in bfloat16: faster on CPUs with AMX, slower on others")
    ] = False,
    checkpoints: Annotated[Path | None, typer.Option(help="keep the state of the training here, on the way")] = None,
    start: Annotated[Path | None, typer.Option(help="begin with the weights and the tokenizer of this model")] = None,
    resume: Annotated[Path | None, typer.Option(help="go on from such a state")] = None,
) -> None:
    """Train tokenizer and model and write them in CharacterGLM's original layout."""
    began, cpu_began = time.perf_counter(), time.process_time()
    torch.set_num_threads(threads)
    work = output_dir.with_name(output_dir.name + ".partial")  # data/nano stays usable until the new one is complete
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    training, _ = prepare(work, seed, broad, start)
    training.bfloat16 = bfloat16
    if start:
        take_weights(training.model, helpers.load(start)[0])
    if resume:
        training.restore(resume)

    def on_log(line: dict) -> None:
        print(" ".join(f"{key} {value:.4g}" for key, value in line.items()), flush=True)
        if checkpoints and line["tokens"] // SAVE_EVERY > (line["tokens"] - 160_000) // SAVE_EVERY:
            checkpoints.mkdir(parents=True, exist_ok=True)
            training.save(checkpoints / f"{line['tokens'] // SAVE_EVERY}.pt")

    print(f"{training.model.num_parameters():,} parameters")
    log = training.run(broad + focus, round(focus / rate), on_log)
    seconds = {"training_seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu_began}
    write(
        training, work, {"parameters": training.model.num_parameters(), "tokens": training.read, **seconds, "log": log}
    )
    output_dir.mkdir(exist_ok=True)
    for file in work.iterdir():
        shutil.move(str(file), output_dir / file.name)
    work.rmdir()


if __name__ == "__main__":
    typer.run(main)
