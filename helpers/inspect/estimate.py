"""The planner: how much GPU memory a task needs, part by part, and how long a download takes.

Counted are the tensors that PyTorch holds at the peak (`torch.cuda.max_memory_allocated`). CUDA itself takes more, so
`Estimate.fits` keeps `RESERVE_GIB` free. Within 5% of measured peaks on a CPU and of all tensors of the 6B, counted
(`benchmarks/memory_estimate.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import AutoConfig, PreTrainedConfig

from ..errors import HelpersError
from ..model.loading import DTYPES, gpu_gib, resolve_model
from ..model.modeling import CharacterGLMConfig
from ..model.shapes import QKV as LORA_TARGETS
from ..model.shapes import linear_shapes, lora_count

RESERVE_GIB = 1.0  # for the CUDA context and the allocator's gaps; a rule of thumb, not measured
USUAL_GPU_GIB = 24.0  # RTX 3090 and 4090
FLOAT32_BYTES = 4
# Per weight of a linear layer. int8: one byte. nf4 with double quantisation: half a byte, one byte of scale for each
# 64 weights, and 4 bytes for each 256 such scales (QLoRA, arXiv 2305.14314, section 3). Both leave the rest in `dtype`.
QUANTIZED_BYTES = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
# Per weight of the whole model in a GGUF file (docs/laptop.md). q8_0: a scale of 2 bytes for 32 weights. q4_k_m: what
# llama-quantize makes of the 6B, 4.08 GB; of a small model somewhat more.
GGUF_BYTES = {"f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_k_m": 4_076_569_000 / 6_243_584_000}
GGUF_BATCH = 512  # tokens of a prompt that llama.cpp reads at a time, in float32
CHOICES = {
    "task": ("chat", "lora", "download"),
    "dtype": tuple(DTYPES),
    "quantization": (None, *QUANTIZED_BYTES, *GGUF_BYTES),
    "lora_targets": tuple(linear_shapes(CharacterGLMConfig())),
}


@dataclass(frozen=True)
class Estimate:
    """What a task needs: `parts` in bytes by name, against a GPU of `gpu_gib`; `seconds` where time can be told."""

    task: str
    parts: dict[str, int]
    gpu_gib: float | None = None
    seconds: float | None = None

    @property
    def gib(self) -> float:
        """All parts together, in GiB."""
        return sum(self.parts.values()) / 2**30

    @property
    def fits(self) -> bool:
        """Whether it fits the GPU, with `RESERVE_GIB` to spare; a download needs none."""
        return self.gpu_gib is None or self.gib + RESERVE_GIB <= self.gpu_gib

    def row(self) -> dict[str, str]:
        """Each part, the sum and the verdict as text: a row of a table."""
        row = {name: f"{size / 2**30:.2f}" if size else "-" for name, size in self.parts.items()}
        row["合计 GiB"] = f"{self.gib:.2f}"
        if self.gpu_gib is not None:
            row[f"{self.gpu_gib:g} GiB 显存"] = "够" if self.fits else "不够"
        if self.seconds is not None:
            row["时间"] = f"{self.seconds / 60:.0f} 分钟"
        return row

    def __str__(self) -> str:
        return f"{self.task}：" + "，".join(f"{name} {text}" for name, text in self.row().items())


def estimate(
    task: str,
    model="6b",
    *,
    dtype: str = "bfloat16",
    quantization: str | None = None,
    batch: int = 1,
    tokens: int = 2048,
    lora_rank: int = 8,
    lora_targets: Sequence[str] = LORA_TARGETS,
    checkpointing: bool = True,
    gpu: float | None = None,
    mbit_per_second: float = 100,
) -> Estimate:
    """The memory a task takes at its peak, or the time a download takes.

    Args:
        task: "chat" (reply to a prompt of `tokens` tokens), "lora" (train an adapter with AdamW) or "download".
        model: "6b" (its files need not be there), "nano", a directory or a config. dtype: in `loading.DTYPES`.
        quantization: None, "int8", "nf4" (not measured: needs a GPU); in llama.cpp "f16", "bf16", "q8_0", "q4_k_m".
        batch, tokens: conversations or rows at a time, and the tokens of each; the rest as in PEFT and the Trainer.
        gpu: in GiB; by default this machine's, or 24 without a GPU.
    """
    numbers = {"batch": batch, "tokens": tokens, "lora_rank": lora_rank, "mbit_per_second": mbit_per_second}
    _check(task=task, dtype=dtype, quantization=quantization, lora_targets=lora_targets, **numbers)
    _check_gguf(task, quantization)
    config, width = _config(model), DTYPES[dtype].itemsize
    if task == "download":
        size = 2 * parameter_count(config)  # stored in half precision
        return Estimate(task, {"下载": size}, seconds=size * 8 / (mbit_per_second * 1e6))
    parts, tokens = {"权重": weight_bytes(config, width, quantization)}, batch * tokens
    if quantization in GGUF_BYTES:
        parts |= _gguf_parts(config, tokens)
    elif task == "chat":
        parts |= _chat_parts(config, width, tokens)
    else:
        parts |= _lora_parts(config, width, tokens, lora_rank, lora_targets, checkpointing)
    if quantization in QUANTIZED_BYTES:  # one linear layer at a time is turned back into `dtype`
        parts["激活"] += width * max(math.prod(shape) for shape in linear_shapes(config).values())
    return Estimate(task, parts, gpu or gpu_gib() or USUAL_GPU_GIB)


def _check_gguf(task: str, quantization: str | None) -> None:
    if quantization in GGUF_BYTES and task != "chat":
        raise HelpersError(f"GGUF 文件只能用来聊天 [invalid quantization]：{task} 请用 None、int8 或 nf4")


def _gguf_parts(config, tokens: int) -> dict[str, int]:
    activations = _chat_parts(config, FLOAT32_BYTES, min(tokens, GGUF_BATCH))["激活"]
    return _chat_parts(config, 2, tokens) | {"激活": activations}  # 2: llama.cpp keeps its cache in float16


def _check(**arguments) -> None:
    for name, value in arguments.items():
        allowed = CHOICES.get(name)
        wrong = [one for one in (value if name == "lora_targets" else [value]) if allowed and one not in allowed]
        if wrong or not (allowed or value > 0):
            should = f"可选 {'、'.join(map(str, allowed))}" if allowed else "应大于 0"
            raise HelpersError(f"{name}={value!r} 没有意义 [invalid {name}]：{should}")


def _config(model):
    if isinstance(model, PreTrainedConfig):
        return model
    return CharacterGLMConfig() if model == "6b" else AutoConfig.from_pretrained(resolve_model(model))


def parameter_count(config) -> int:
    """Parameters of the whole model: 6,243,584,000 for the 6B."""
    biases = sum(linear_shapes(config)[name][1] for name in LORA_TARGETS)  # q, k and v have one
    norms = config.hidden_size * (2 * config.num_hidden_layers + 1)
    embeddings = 2 * config.vocab_size * config.hidden_size  # input and output, untied
    return _linear_count(config) + config.num_hidden_layers * biases + norms + embeddings


def _linear_count(config) -> int:
    return config.num_hidden_layers * sum(rows * columns for rows, columns in linear_shapes(config).values())


def weight_bytes(config, width: int, quantization: str | None = None) -> int:
    """Bytes of the weights, `width` bytes each unless quantised."""
    if quantization in GGUF_BYTES:
        return round(parameter_count(config) * GGUF_BYTES[quantization])
    quantized = _linear_count(config) if quantization else 0
    return round(quantized * QUANTIZED_BYTES.get(quantization, 0)) + (parameter_count(config) - quantized) * width


def _chat_parts(config, width: int, tokens: int) -> dict[str, int]:
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * width * tokens
    # The peak is in the feed-forward of a block. Alive there: embeddings, the block's input, residual and normalised
    # input (4 x hidden), gate and up, silu(gate) and the product (4 x intermediate).
    prefill = width * tokens * 4 * (config.hidden_size + config.intermediate_size)
    return {"KV cache": cache, "LoRA": 0, "优化器": 0, "激活": prefill}


def _lora_parts(config, width: int, tokens: int, rank: int, targets: Sequence[str], checkpointing: bool) -> dict:
    adapter = FLOAT32_BYTES * lora_count(config, rank, targets)
    hidden, groups = config.hidden_size, config.num_key_value_heads * config.head_dim
    # The peak is where the loss goes backwards: log-probabilities and two gradients over the vocabulary, in float32,
    # beside what all blocks have saved. With checkpointing a block saves its input only.
    saved = hidden * width
    if not checkpointing:
        # For the backward pass through frozen weights: the float32 inputs of two norms; gate, up and silu(gate);
        # queries, keys, values and output of attention; inputs of the adapters.
        saved = 2 * hidden * FLOAT32_BYTES
        saved += width * (3 * config.intermediate_size + 2 * (hidden + groups) + len(targets) * hidden)
    loss = FLOAT32_BYTES * (hidden + 3 * config.vocab_size)
    # AdamW keeps two moments; the adapter's gradients come after the peak.
    parts = {"KV cache": 0, "LoRA": adapter, "优化器": 2 * adapter}
    return parts | {"激活": tokens * (config.num_hidden_layers * saved + loss)}
