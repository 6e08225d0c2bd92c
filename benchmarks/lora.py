"""How many more samples a second does LoRA training learn from if rows are not padded to 512 tokens?

The usual lesson's recipe (batch 4, every row padded to 512 tokens) against others, on the same batch size but for the
last:

- rows of similar length together, padded to the longest, logits only from the first learned token on (`pad`);
- packing: the rows behind each other in one sequence, no padding (transformers' `DataCollatorWithFlattening`);
- what `helpers.finetune` does: packing with the persona, which all rows begin with, computed once (`share_prefix`),
  and once more with the batch of 8 that it takes if none is named;
- TRL's SFTTrainer, if it is installed, on the grouped rows: padded to the longest, and without padding.

Same model, data and precision; whole training steps (forward, backward, optimizer); in alternating order in one run,
after a warm-up. Printed: median samples a second and their ratio, on CharacterGLM-Nano in float32, and the loss on the
same rows, which must not depend on how they are batched.

    python benchmarks/lora.py
    python benchmarks/lora.py --data huanhuan.json --repetitions 9 --threads 1 --cpu-time
    python benchmarks/lora.py --quick     # fewer and shorter measurements

`--data` is the instruction set that readers of the lesson bring along; without it the project's own set is used.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from support.report import CpuTime, JsonFile, Quick, Threads, publish
from support.rounds import Ratio, in_turns
from support.trl_peer import sft_step
from transformers import DataCollatorWithFlattening

import helpers
from helpers.finetune import add_lora, collate, describe_lengths, encode_samples, load_samples, pad, read_card
from helpers.finetune.arguments import DEFAULTS
from helpers.finetune.command import DEFAULT_CARD, DEFAULT_DATA
from helpers.finetune.encoding import IGNORED
from helpers.finetune.training import EpochGroupedSampler

HUANHUAN = Path(__file__).parents[2] / "shared" / "data" / "huanhuan.json"
HUANHUAN_CARD = {"bot_name": "甄嬛", "bot_info": "皇帝身边的女人。", "user_name": "用户"}
BATCH, OWN_BATCH, PADDED_TO = 4, DEFAULTS["per_device_train_batch_size"], 512
LESSON, OURS = f"padded to {PADDED_TO}", "helpers.finetune"


def main(
    data: Annotated[Path, typer.Option(help="Instruction data, by default huanhuan.json if it is there.")] = HUANHUAN,
    repetitions: Annotated[int, typer.Option(min=3, help="Times each recipe is measured.")] = 7,
    steps: Annotated[int, typer.Option(min=4, help="Training steps of a measurement.")] = 12,
    threads: Threads = 0,
    cpu_time: CpuTime = False,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    """Print samples a second of the recipes."""
    repetitions, steps = (3, 4) if quick else (repetitions, steps)
    model, tokenizer = new_model()
    rows, source = read_rows(data, tokenizer)
    recipes = {
        LESSON: Recipe(model, pad_to_fixed_length, shuffled(rows)),
        "grouped, padded": Recipe(model, pad, grouped(rows)),
        "packed": Recipe(model, DataCollatorWithFlattening(), grouped(rows)),
        OURS: Recipe(model, collate, grouped(rows)),
        f"{OURS}, batch {OWN_BATCH}": Recipe(model, collate, grouped(rows, OWN_BATCH), size=OWN_BATCH),
        **trl_recipes(grouped(rows)),
    }
    losses = {name: mean_loss(recipe, rows[:64]) for name, recipe in recipes.items()}
    speeds = measure(recipes, repetitions, steps, time.process_time if cpu_time else time.perf_counter)
    publish(
        "不填充到 512，微调快多少？How much faster is LoRA training if rows are not padded to 512 tokens?",
        ["recipe", "samples/s", "loss per token of the same 64 rows"],
        [[name, f"{statistics.median(each):.1f}", f"{losses[name]:.5f}"] for name, each in speeds.items()]
        + ([] if has_trl() else [["TRL", "not installed: pip install trl", ""]]),
        ratios=compared(speeds),
        setting=f"Nano, {len(rows):,} rows of {source}, median of {repetitions} times {steps} steps, CPU, float32"
        + (", CPU time" if cpu_time else ""),
        json_file=json_file,
    )


def compared(speeds: dict[str, list[float]]) -> dict[str, Ratio]:
    """Every recipe against the lesson's, and ours against TRL's."""
    ratios = {
        f"{name}, against {LESSON}": Ratio.of(each, speeds[LESSON]) for name, each in speeds.items() if name != LESSON
    }
    for name in (name for name in speeds if name.startswith("TRL")):
        ratios[f"{OURS}, against {name}"] = Ratio.of(speeds[OURS], speeds[name])
    return ratios


class Recipe:
    """A way of training: how rows become a batch, in which order they come, and what a step is."""

    def __init__(self, model, batch: Callable, rows: list[dict], backward: Callable | None = None, size: int = BATCH):
        self.model, self.batch, self.rows, self.size = model, batch, rows, size
        self.backward = backward or (lambda rows: model(**batch(rows)).loss.backward())
        self.optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)


def new_model() -> tuple:
    """Nano with a new adapter, and its tokenizer."""
    model, tokenizer = helpers.load("nano", device_map="cpu", dtype="float32")
    torch.manual_seed(0)
    model = add_lora(model, "qkv")
    model.config.use_cache = False  # as the Trainer does: training has no use for a KV cache
    return model, tokenizer


def has_trl() -> bool:
    return importlib.util.find_spec("trl") is not None


def trl_recipes(rows: list[dict]) -> dict[str, Recipe]:
    """TRL's, each with a model of its own, as it changes the model's forward; none if it is not installed."""
    found = {}
    for name, padding_free in {"TRL, padded": False, "TRL, padding-free": True}.items() if has_trl() else ():
        model, tokenizer = new_model()
        batch, backward = sft_step(model, tokenizer, rows, BATCH, padding_free)
        found[name] = Recipe(model, batch, rows, backward)
    return found


def read_rows(data: Path, tokenizer) -> tuple[list[dict], str]:
    """The sequences of a data file and its name; of the project's own set if there is no such file."""
    card = HUANHUAN_CARD
    if not data.exists():
        print(f"{data.name} is not on this machine: the project's own set is used")
        data, card = DEFAULT_DATA, read_card(DEFAULT_CARD)
    samples, report = load_samples(data, card)
    rows = encode_samples(tokenizer, samples, PADDED_TO, report)
    print(report, describe_lengths(rows, PADDED_TO))
    return rows, data.name


def pad_to_fixed_length(rows: list[dict]) -> dict:
    """The lesson's batch: every row filled up to 512 tokens, with an attention mask."""
    lengths = [len(row["input_ids"]) for row in rows]
    return {
        "input_ids": torch.tensor([r["input_ids"] + [0] * (PADDED_TO - n) for r, n in zip(rows, lengths)]),
        "labels": torch.tensor([r["labels"] + [IGNORED] * (PADDED_TO - n) for r, n in zip(rows, lengths)]),
        "attention_mask": torch.tensor([[1] * n + [0] * (PADDED_TO - n) for n in lengths]),
    }


def shuffled(rows: list[dict]) -> list[dict]:
    """Rows in random order, the same every time."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return [rows[i] for i in order]


def grouped(rows: list[dict], size: int = BATCH) -> list[dict]:
    """Rows in the order in which `helpers.finetune` takes them."""
    return [rows[i] for i in EpochGroupedSampler(size, [len(row["input_ids"]) for row in rows], seed=0)]


@torch.no_grad()
def mean_loss(recipe: Recipe, rows: list[dict]) -> float:
    """Loss per learned token without dropout: it must not depend on how rows are batched."""
    total = count = 0
    recipe.model.eval()
    for start in range(0, len(rows), BATCH):
        group = rows[start : start + BATCH]
        learned = sum(label != IGNORED for row in group for label in row["labels"])
        total, count = total + learned * recipe.model(**recipe.batch(group)).loss.item(), count + learned
    return total / count


def measure(recipes: dict[str, Recipe], repetitions: int, steps: int, clock: Callable) -> dict[str, list[float]]:
    """Samples a second of each recipe, round by round, on the same `steps` batches in every round."""

    def speed(recipe: Recipe, _: int) -> float:
        return steps * recipe.size / run_steps(recipe, representative(recipe.rows, steps, recipe.size), clock)

    sides = {name: partial(speed, recipe) for name, recipe in recipes.items()}
    return in_turns(sides, range(repetitions + 1), warm_up=True)


def representative(rows: list[dict], count: int, size: int = BATCH) -> list[list[dict]]:
    """So many of the batches that `rows` make: evenly spaced by size, so that long and short ones have their share."""
    batches = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
    batches.sort(key=lambda batch: sum(len(row["input_ids"]) for row in batch))
    return [batches[(2 * number + 1) * len(batches) // (2 * count)] for number in range(count)]


def run_steps(recipe: Recipe, groups: list[list[dict]], clock: Callable) -> float:
    """Seconds for one training step on each group of rows."""
    recipe.model.train()
    start = clock()
    for rows in groups:
        recipe.backward(rows)
        torch.nn.utils.clip_grad_norm_(recipe.model.parameters(), 1.0)
        recipe.optimizer.step()
        recipe.optimizer.zero_grad()
    return clock() - start


if __name__ == "__main__":
    typer.run(main)
