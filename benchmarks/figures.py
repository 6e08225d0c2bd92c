"""How fast does the model run on this device, and in how much memory?

Measured: seconds to load; seconds to the first token of a reply to a prompt of 1,024 tokens, and tokens per second after
it (greedy, one conversation, medians); samples per second of LoRA training with transformers' Trainer (rank 8 on q, k
and v; batch 4, 512 tokens, gradient checkpointing). For each the peak memory, and what `helpers.estimate` says. On the
CPU the peak is that of the whole process, libraries included, so only a GPU's is compared with the estimate.

    python benchmarks/figures.py                                    # the 6B on a GPU, else Nano
    python benchmarks/figures.py --model models/6b-shape --output-dir benchmarks/results
    python benchmarks/figures.py --quick                            # Nano, shorter
"""

import re
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from support.report import JsonFile, Quick, publish
from support.rounds import ROUNDS
from support.talk import random_ids
from transformers import Trainer, TrainerCallback, TrainingArguments

import helpers
from helpers.inspect.estimate import LORA_TARGETS
from helpers.inspect.receipt import collect_versions, describe_device, utc_now
from helpers.paths import write_json


def main(
    model: Annotated[str, typer.Option(help="auto, nano, 6b or a folder.")] = "auto",
    output_dir: Annotated[Path | None, typer.Option(help="Write DEVICE.json there.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=8)] = 1024,
    new_tokens: Annotated[int, typer.Option(min=8)] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Rows in a training step.")] = 4,
    row_tokens: Annotated[int, typer.Option(min=8, help="Tokens in a row.")] = 512,
    steps: Annotated[int, typer.Option(min=3, help="Training steps; the first is not timed.")] = 8,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    """Measure, print a table, and write the figures as JSON."""
    if quick:
        model, new_tokens, steps = "nano", 64, 4
    loaded, load = measure_load(model)
    report = {
        "time_utc": utc_now(),
        "device": describe_device(),
        "versions": collect_versions(),
        "model": {
            "name": Path(loaded.name_or_path).name,
            "parameters": loaded.num_parameters(),
            "dtype": dtype_of(loaded),
        },
        "load": load,
        "chat": measure_chat(loaded, prompt_tokens, new_tokens),
        "lora": measure_lora(loaded, batch, row_tokens, steps),
    }
    show(report, json_file)
    if output_dir:
        print(write_json(output_dir / f"{slug(report['device']['name'])}.json", report))


def measure_load(model: str) -> tuple:
    """(the model, figures of loading it)."""
    start = time.perf_counter()
    loaded, _ = helpers.load(model)
    synchronize(loaded.device)
    seconds = time.perf_counter() - start
    return loaded, {"seconds": seconds, "peak_bytes": peak_bytes(loaded.device)}


def measure_chat(model, prompt_tokens: int, new_tokens: int) -> dict:
    """Figures of a reply of `new_tokens` tokens to a prompt of random ones."""
    ids = random_ids(1, prompt_tokens).to(model.device)
    reply(model, ids, 2)  # warm-up: kernels are compiled or chosen
    reset_peak(model.device)
    first = statistics.median(reply(model, ids, 1) for _ in range(ROUNDS))
    whole = statistics.median(reply(model, ids, new_tokens) for _ in range(ROUNDS))
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "first_token_seconds": first,
        "tokens_per_second": (new_tokens - 1) / (whole - first),
        "peak_bytes": peak_bytes(model.device),
        "estimated_bytes": estimated(model, "chat", tokens=prompt_tokens + new_tokens),
    }


def reply(model, ids: torch.Tensor, new_tokens: int) -> float:
    """Seconds for exactly so many greedy tokens."""
    start = time.perf_counter()
    options = {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    synchronize(model.device)
    return time.perf_counter() - start


class StepClock(TrainerCallback):
    """Notes when each training step ended."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.ends = device, []

    def on_step_end(self, *_: object, **__: object) -> None:
        """Wait for the device, then read the clock."""
        synchronize(self.device)
        self.ends.append(time.perf_counter())


def measure_lora(model, batch: int, tokens: int, steps: int) -> dict:
    """Figures of training a LoRA adapter on rows of random tokens, all of the same length."""
    expected = estimated(model, "lora", batch=batch, tokens=tokens)
    dtype, device = model.dtype, model.device
    adapter = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, lora_dropout=0.1, target_modules=list(LORA_TARGETS))
    model = get_peft_model(model, adapter)
    model.enable_input_require_grads()
    rows = random_ids(batch * steps, tokens).tolist()
    clock = StepClock(device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=batch,
            max_steps=steps,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            use_cpu=device.type == "cpu",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
        reset_peak(device)
        result = Trainer(model, arguments, train_dataset=dataset, callbacks=[clock]).train()
    return {
        "batch": batch,
        "tokens": tokens,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "loss": result.training_loss,
        "samples_per_second": batch * (steps - 1) / (clock.ends[-1] - clock.ends[0]),
        "peak_bytes": peak_bytes(device),
        "estimated_bytes": expected,
    }


def estimated(model, task: str, **options) -> int:
    """What `helpers.estimate` says, in bytes."""
    return sum(helpers.estimate(task, model.config, dtype=dtype_of(model), **options).parts.values())


def dtype_of(model) -> str:
    """The name of a model's dtype: "bfloat16"."""
    return str(model.dtype).removeprefix("torch.")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement of the peak; a process's own peak, on the CPU, cannot be reset."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The most that tensors took on the GPU; on the CPU, of the whole process with all its libraries."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def slug(name: str) -> str:
    """A device's name as a file name: "NVIDIA GeForce RTX 4090" becomes "nvidia-geforce-rtx-4090"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def show(report: dict, json_file: Path | None) -> None:
    """The figures as a table."""
    model, device = report["model"], report["device"]
    rows = [[task, *line(*figure)] for task in ("load", "chat", "lora") for figure in report[task].items()]
    publish(
        "模型在这台设备上多快、占多少内存？How fast does the model run on this device, and in how much memory?",
        ["task", "figure", "value"],
        rows,
        ratios={},
        setting=f"{model['name']}, {model['dtype']}, {device['name']}",
        json_file=json_file,
        better="neither",
    )


def line(name: str, value: float) -> tuple[str, str]:
    """A figure as it stands in the table."""
    if name.endswith("_bytes"):
        return name.replace("_bytes", " GiB"), f"{value / 2**30:.2f}"
    return name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


if __name__ == "__main__":
    typer.run(main)
