"""From a model name to a model on a device: which files, which dtype, which device, and why.

Importing this module registers the CharacterGLM family with transformers' Auto classes.
"""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..errors import CheckpointError, HelpersError
from ..paths import PROJECT_DIR
from . import modeling, tokenization
from .adapters import add_adapter
from .checkpoint import check_checkpoint, weight_files
from .download import find_downloaded
from .kv_cache import QUANTIZED_OR_COMPILED, compile_decoding

NANO_DIR = PROJECT_DIR / "data" / "nano"
MIN_GPU_GIB = 16  # the 6B model needs about 13 GiB in half precision, plus KV cache
SMALL_CHECKPOINT_BYTES = 1 << 30  # below this, float32 on a CPU is the simplest and most exact choice
SHARED_OUT = ("balanced", "balanced_low_0", "sequential")  # other ways of accelerate's to use several GPUs
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
logger = logging.getLogger(__name__)
modeling.register()
tokenization.register()
# PEFT 0.21 asks for a property by the name it had before transformers 5.23: nothing that a reader could change.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
# On a CPU with AVX512-BF16, bitsandbytes (which PEFT imports too) asks for a package whose kernel would come from a hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@dataclass(frozen=True)
class LoadChoice:
    """What `load` would do, and why. `print` it."""

    path: Path
    dtype: torch.dtype
    device_map: str | int | torch.device | dict
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        what = f"模型 {self.path.name}，dtype {str(self.dtype).removeprefix('torch.')}，设备 {self.device_map}"
        return "\n  - ".join([what, *self.reasons])


def load(model="auto", *, dtype="auto", device_map="auto", quantization=None, adapter=None, compile=False):
    """Load a CharacterGLM model for inference. Memory holds one copy of the weights (`benchmarks/loading.py`).

    Args:
        model: "auto" (6b on a CUDA GPU of at least 16 GB, else nano), "nano", "6b", or a model directory.
        dtype: "float32", "float16", "bfloat16", a `torch.dtype`, or "auto": bfloat16 on a GPU that computes in it,
            float16 on older GPUs, and on a CPU float32 for small models and bfloat16 for large ones.
        device_map: as in transformers; "auto" uses the GPUs there are, else the CPU; 0 is the first GPU.
        quantization: "int8" or "nf4" (bitsandbytes): the linear layers' weights in 8 or 4 bits, the rest in `dtype`.
        adapter: directory of a PEFT LoRA adapter to put on top.
        compile: decode with torch.compile: the first reply waits a minute, later ones are faster; prompt and reply have
            at most `kv_cache.STATIC_TOKENS` tokens. Not with `quantization`, and not in the API server.

    Returns:
        `(model, tokenizer)`, the model in evaluation mode.

    Raises:
        HelpersError: files missing or not CharacterGLM, a senseless argument, bitsandbytes or a compiler missing.
    """
    if compile and quantization is not None:
        raise HelpersError(QUANTIZED_OR_COMPILED)  # before a minute of loading
    # 1. Which files, in which precision, on which device.
    choice = choose(model, dtype=dtype, device_map=device_map)
    logger.info("%s", choice)
    quantized = {} if quantization is None else {"quantization_config": quantization_config(quantization, choice.dtype)}
    # 2. The config first, because AutoTokenizer would hide what is wrong with it; then the tokenizer, in a moment.
    config = AutoConfig.from_pretrained(choice.path)
    tokenizer = load_tokenizer(choice.path, config)
    # 3. The weights: seconds from a disk cache, a minute without.
    options = {"config": config, "dtype": choice.dtype, "device_map": choice.device_map, **quantized}
    loaded = AutoModelForCausalLM.from_pretrained(choice.path, **options)
    # 4. What goes on top.
    if compile:
        compile_decoding(loaded)
        logger.warning("第一条回复要先编译，约一分钟，之后更快 [compiling: the first reply takes about a minute]")
    return (add_adapter(loaded, adapter) if adapter is not None else loaded).eval(), tokenizer


def load_tokenizer(path: Path, config):
    """The tokenizer in `path`; `CheckpointError` if it knows tokens that the model has no embedding for."""
    tokenizer = AutoTokenizer.from_pretrained(path, config=config)
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"tokenizer.model 有 {len(tokenizer)} 个 token，模型只有 {config.vocab_size} 个 [tokenizer mismatch]："
            f"{path}。它们必须来自同一个模型"
        )
    return tokenizer


def choose(model="auto", *, dtype="auto", device_map="auto") -> LoadChoice:
    """What `load` with the same arguments would pick, without loading anything."""
    name, why_model = pick_model(model)
    path = resolve_model(name)
    device, why_device = pick_device(device_map)
    chosen, why_dtype = pick_dtype(dtype, device, path)
    return LoadChoice(path, chosen, device, (why_model, why_device, why_dtype))


def pick_model(model="auto") -> tuple[str, str]:
    """Which model is meant and why: "auto" becomes "6b" on a CUDA GPU of at least 16 GiB, else "nano"."""
    if model != "auto":
        return str(model), f"指定了 {model}"
    memory = gpu_gib()
    if memory >= MIN_GPU_GIB:
        return "6b", f"auto 选了 6b：GPU 有 {memory:.0f} GiB 显存（至少要 {MIN_GPU_GIB}）"
    seen = f"最大的 GPU 只有 {memory:.0f} GiB 显存" if memory else "没有 CUDA GPU"
    return "nano", f"auto 选了 nano：{seen}，6b 至少要 {MIN_GPU_GIB} GiB。Nano 是教学替身，不是 6B"


def resolve_model(model="auto") -> Path:
    """The directory of a model: "auto", "nano", "6b" or a path; `CheckpointError` if it is not here or not complete."""
    name, _ = pick_model(model)
    path = NANO_DIR if name == "nano" else find_downloaded() if name == "6b" else Path(name).expanduser()
    if path is None:
        raise CheckpointError(
            "这台机器上没有 CharacterGLM-6B [model not downloaded]：先运行 helpers.download_model() "
            "或 python -m helpers download；没有 GPU 时用 MODEL='nano'"
        )
    if not name or not path.is_dir():
        raise CheckpointError(f"没有这个模型 [unknown model]：{name!r}。可选 auto、nano、6b，或一个模型目录的路径")
    check_checkpoint(path)
    return path


def gpu_gib() -> float:
    """Memory of the largest CUDA GPU in GiB; 0.0 without one."""
    if not torch.cuda.is_available():
        return 0.0
    return max(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())) / 2**30


def pick_device(device_map="auto") -> tuple[str | int | torch.device | dict, str]:
    """The `device_map` to load with and the reason; `HelpersError` if it names what this machine does not have."""
    if device_map in (None, {}):
        return "cpu", "设备由你指定"
    if device_map != "auto":
        if device_map not in SHARED_OUT:
            for place in device_map.values() if isinstance(device_map, dict) else [device_map]:
                check_place(place)
        return device_map, "设备由你指定"
    if torch.cuda.is_available():
        return "auto", f"有 CUDA GPU：{torch.cuda.get_device_name(0)}"
    if torch.backends.mps.is_available():
        return "mps", "有 Apple GPU (MPS)"
    return "cpu", "没有 GPU，用 CPU"


def check_place(place: str | int | torch.device) -> None:
    """Raise `HelpersError` unless `place` is a device that this machine has."""
    if place == "disk":
        raise HelpersError(
            "权重不能留在磁盘上 [disk offload not supported]：用 device_map='auto'；放不下时用 quantization='nf4'，"
            "或 GGUF（docs/laptop.md）"
        )
    try:
        device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
        count = torch.get_device_module(device).device_count()
    except (RuntimeError, TypeError):
        raise HelpersError(
            f"不认识的设备 [unknown device]：{place!r}。可选 'auto'、'cpu'、'cuda'、'cuda:1'、'mps'，或 GPU 的编号 0、1 ……"
        ) from None
    if (device.index or 0) >= count:
        raise HelpersError(
            f"这台机器没有设备 {device} [no such device]：这一类有 {count} 个。用 device_map='auto'，或先运行 python -m helpers doctor"
        )


def pick_dtype(dtype, device: str | int | torch.device | dict, path: Path) -> tuple[torch.dtype, str]:
    """The dtype for a model on a device and the reason; `HelpersError` for an unknown dtype."""
    if dtype != "auto":
        if not isinstance(chosen := DTYPES.get(dtype, dtype), torch.dtype):
            raise HelpersError(f"不认识的 dtype [unknown dtype]：{dtype!r}，可选 auto、{'、'.join(DTYPES)}")
        return chosen, "dtype 由你指定"
    kinds = {str(place) for place in (device.values() if isinstance(device, dict) else [device])}
    if kinds == {"mps"}:
        return torch.float16, "Apple GPU 用 float16"
    if kinds == {"cpu"}:
        if sum(file.stat().st_size for file in weight_files(path)) < SMALL_CHECKPOINT_BYTES:
            return torch.float32, "CPU 上的小模型用 float32：最精确，内存也够"
        return torch.bfloat16, "CPU 上的大模型用 bfloat16：float32 要两倍内存"
    # The model may be spread over all GPUs: the oldest decides.
    if all(torch.cuda.get_device_capability(i)[0] >= 8 for i in range(torch.cuda.device_count())):
        return torch.bfloat16, "GPU 原生支持 bfloat16，权重也是以 bfloat16 保存的"
    return torch.float16, "GPU 早于 Ampere，没有原生 bfloat16，用 float16"


def quantization_config(quantization: str, dtype: torch.dtype):
    """The bitsandbytes configuration for "int8" or "nf4"; `HelpersError` if unknown or bitsandbytes is missing."""
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if quantization not in ("int8", "nf4"):
        raise HelpersError(f"不认识的量化方式 [unknown quantization]：{quantization!r}，可选 None、'int8'、'nf4'")
    # On a CPU it says for every layer and token that it rounds the inputs of int8 to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if not is_bitsandbytes_available():
        raise HelpersError("量化需要 bitsandbytes [bitsandbytes not installed]：pip install bitsandbytes")
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )
