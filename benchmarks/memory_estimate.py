"""How far is `helpers.estimate` from the memory that is really used?

Two answers, each beside the estimate:

- measured: the growth of a process's resident memory up to its peak, on the CPU in float32, for Nano and random models
  of the same architecture. Every case runs in a process of its own. There glibc is told to give each tensor pages of its
  own and to return them at once: otherwise it keeps freed memory, and the peak says more about malloc than about the
  model. The task runs on a tiny model first, so that libraries and buffers do not count.
- counted: every tensor that PyTorch would allocate, for the true shape of the 6B in bfloat16, without the memory and
  without a GPU (`FakeTensorMode` runs the code on tensors that have a shape and no data).

    python benchmarks/memory_estimate.py
    python benchmarks/memory_estimate.py --quick     # Nano and one small model
"""

import json
import os
import statistics
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Annotated

import torch
import typer
from support.memory import memory_status
from support.report import JsonFile, Quick, publish
from support.rounds import ROUNDS, Ratio
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM

import helpers
from helpers.inspect.estimate import LORA_TARGETS
from helpers.model.modeling import CharacterGLMConfig

TOLERANCE = 0.05
PAGES_PER_TENSOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
SHAPES = {
    "tiny": {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 160, "padded_vocab_size": 512},
    "Nano": {"num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 1920, "padded_vocab_size": 4096},
    "34M": {"num_layers": 6, "hidden_size": 512, "ffn_hidden_size": 1408, "padded_vocab_size": 16384},
    "100M": {"num_layers": 8, "hidden_size": 768, "ffn_hidden_size": 2048, "padded_vocab_size": 32768},
    "313M": {"num_layers": 16, "hidden_size": 1024, "ffn_hidden_size": 2816, "padded_vocab_size": 65024},
}
HEADS = {"num_attention_heads": 8, "multi_query_group_num": 2}
# (shape, task, options of helpers.estimate)
QUICK = [
    ("34M", "chat", {"tokens": 500}),
    ("34M", "lora", {"batch": 2, "tokens": 128, "checkpointing": False}),
]
MEASURED = [
    *QUICK,
    ("Nano", "chat", {"tokens": 2000}),  # so small that what a CPU's matrix library keeps for itself can be 5 %
    ("Nano", "lora", {"batch": 4, "tokens": 256}),
    ("100M", "chat", {"tokens": 1000, "batch": 2}),
    ("100M", "lora", {"batch": 2, "tokens": 128}),
    ("100M", "lora", {"batch": 2, "tokens": 128, "checkpointing": False}),
    ("313M", "chat", {"tokens": 500}),
    ("313M", "lora", {"batch": 2, "tokens": 128}),
]
COUNTED = [
    ("chat", {"tokens": 2048}),
    ("chat", {"tokens": 8192}),
    ("lora", {"batch": 4, "tokens": 512}),
    ("lora", {"batch": 4, "tokens": 512, "checkpointing": False}),
]


def main(
    quick: Quick = False,
    json_file: JsonFile = None,
    measure: Annotated[str | None, typer.Option(hidden=True, help="One case as JSON, in this process.")] = None,
) -> None:
    """Print estimate, measurement and their ratio; exit code 1 if one is off by more than 5%."""
    if measure:
        print(resident_growth(*json.loads(measure)))
        return
    rows, ratios = [], {}
    for shape, task, options in QUICK if quick else MEASURED:
        expected = helpers.estimate(task, config_of(shape), dtype="float32", **options)
        add_row(rows, ratios, f"{shape} measured", expected, options, measured(shape, task, options))
    for task, options in [] if quick else COUNTED:
        expected = helpers.estimate(task, "6b", **options)
        add_row(rows, ratios, "6B counted", expected, options, [counted(task, options)] * ROUNDS)
    publish(
        "helpers.estimate 与实际占用差多少？How far is helpers.estimate from the memory really used?",
        ["model", "task", "estimated MiB", "found MiB"],
        rows,
        ratios=ratios,
        setting="estimate / measured peak of a CPU process in float32, or / counted tensors in bfloat16",
        json_file=json_file,
        better="at 1",
    )
    raise typer.Exit(int(any(abs(ratio.median - 1) > TOLERANCE for ratio in ratios.values())))


def add_row(rows: list, ratios: dict, model: str, expected: helpers.Estimate, options: dict, found: list[int]) -> None:
    """Add a case to the table, and estimate / measurement to the ratios."""
    case = " ".join([expected.task, *(f"{name} {value}" for name, value in options.items())])
    rows.append([model, case, f"{expected.gib * 1024:,.1f}", f"{statistics.median(found) / 2**20:,.1f}"])
    ratios[f"{model}: {case}"] = Ratio.of([sum(expected.parts.values())] * len(found), found)


def config_of(shape: str) -> CharacterGLMConfig:
    """The config of a random model."""
    return CharacterGLMConfig(**SHAPES[shape], **HEADS, kv_channels=SHAPES[shape]["hidden_size"] // 8)


# --- measured


def measured(shape: str, task: str, options: dict) -> list[int]:
    """`resident_growth` of a case in bytes, every time in a new process: what an old one has freed it uses again."""
    command = [sys.executable, __file__, "--measure", json.dumps([shape, task, options])]
    found = []
    for _ in range(ROUNDS):
        done = subprocess.run(command, env=os.environ | PAGES_PER_TENSOR, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        found.append(int(done.stdout))
    return found


def resident_growth(shape: str, task: str, options: dict) -> int:
    """How far this process's resident memory rises above what it was, in bytes (Linux)."""
    run(AutoModelForCausalLM.from_config(config_of("tiny")), task, options)
    before = memory_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, to what is used now
    run(AutoModelForCausalLM.from_config(config_of(shape)), task, options)
    return memory_status("VmHWM") - before


def run(model, task: str, options: dict) -> None:
    """Do what the estimate is about: a reply of two tokens, or two steps of training an adapter."""
    ids = torch.randint(3, 500, (options.get("batch", 1), options["tokens"]))
    if task == "chat":
        model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    else:
        train(with_adapter(model), ids, options.get("checkpointing", True))


def with_adapter(model):
    """The model with a LoRA adapter of rank 8 on q, k and v."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=list(LORA_TARGETS))
    return get_peft_model(model, config, low_cpu_mem_usage=model.device.type == "meta")


def train(model, ids: torch.Tensor, checkpointing: bool) -> None:
    """Two steps of AdamW on the adapter, computing in the dtype of the frozen weights as the Trainer does."""
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    dtype = model.get_input_embeddings().weight.dtype
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# --- counted


class TensorCounter(TorchDispatchMode):
    """Keeps the sum of the bytes of all living tensors, and its highest value."""

    def __init__(self) -> None:
        super().__init__()
        self.living: dict[int, int] = {}
        self.peak = 0

    def see(self, tensor: torch.Tensor) -> None:
        """Count the tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.living:
            self.living[storage._cdata] = storage.nbytes()
            self.peak = max(self.peak, sum(self.living.values()))
            weakref.finalize(storage, self.living.pop, storage._cdata)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run an operation and count what it makes."""
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.see, result)
        return result


def counted(task: str, options: dict) -> int:
    """Bytes of all tensors at the peak of a task on the 6B in bfloat16."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CharacterGLMConfig(), dtype=torch.bfloat16)
        model = with_adapter(model) if task == "lora" else model.eval().requires_grad_(False)
    with FakeTensorMode(), TensorCounter() as counter:
        give_fake_weights(model)
        ids = torch.randint(3, 500, (options.get("batch", 1), options["tokens"]))
        if task == "lora":
            train(model, ids, options.get("checkpointing", True))
        else:
            with torch.no_grad():
                model(ids, use_cache=True, logits_to_keep=1)  # as generate does with a prompt
    return counter.peak


def give_fake_weights(model) -> None:
    """Replace weights on the meta device; those that are trained become float32, as PEFT keeps them."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            dtype = torch.float32 if weight.requires_grad else weight.dtype
            fake = torch.empty(weight.shape, dtype=dtype)
            setattr(module, name, torch.nn.Parameter(fake, requires_grad=weight.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


if __name__ == "__main__":
    typer.run(main)
