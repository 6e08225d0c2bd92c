"""The KV cache of a conversation, kept from reply to reply: one that grows, and one of fixed length for torch.compile.

Decoding computes one token at a time, and much of that time goes into starting each small operation. `torch.compile`
joins them (on a GPU into one CUDA graph), but needs tensors whose shapes and addresses never change.
"""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

from transformers import DynamicCache, StaticCache

from ..errors import HelpersError

STATIC_TOKENS = 4096  # longest prompt and reply of a compiled model; 115 MiB for the 6B in half precision
QUANTIZED_OR_COMPILED = (
    "量化的模型不能编译 [cannot compile a quantised model]：quantization 和 compile 只能选一个。"
    "显存不够选 quantization，够就选 compile"
)


class PromptCache:
    """The KV cache of the last prompt and reply, kept for the next prompt that begins with the same tokens."""

    compiled = False  # whether `generate` may compile

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.token_ids: list[int] = []
        self.key_values = DynamicCache()

    def reuse(self, input_ids: list[int]) -> int:
        """Cut the cache to the longest common prefix with `input_ids` and return its length.

        At least one token is left to compute: the model needs it to predict the next one.
        """
        keep = common_prefix_length(self.token_ids, input_ids[:-1])
        self.token_ids = self.token_ids[:keep]
        self._cut(keep)
        return keep

    def _cut(self, keep: int) -> None:
        cached = self.key_values.get_seq_length()
        if keep == 0:
            self.clear()
        elif keep < cached:
            self.key_values.crop(-(cached - keep))  # a negative number of tokens to drop: the form 5.23 accepts

    def record(self, token_ids: list[int]) -> None:
        """Remember which tokens the cache now stands for: the last generated one was never fed back."""
        self.token_ids = token_ids[: int(self.key_values.get_seq_length())]


class CompiledDecoding:
    """What a compiled model decodes with: its one KV cache, of `length` tokens, and who used it last.

    All conversations share the cache, because what was compiled is bound to its address. Only one reply is written at a
    time; a conversation that finds another's tokens there computes its prompt again.
    """

    def __init__(self, model, length: int):
        self.length = length
        self.key_values = StaticCache(config=model.config, max_cache_len=length)
        self.user: StaticPromptCache | None = None


class StaticPromptCache(PromptCache):
    """A `PromptCache` in the cache of a compiled model. `clear` gives no memory back: the model keeps it."""

    compiled = True

    def __init__(self, decoding: CompiledDecoding):
        self.decoding, self.key_values = decoding, decoding.key_values
        self.clear()

    def clear(self) -> None:
        self.token_ids = []  # and nothing in the shared cache: another conversation may be writing there

    def reuse(self, input_ids: list[int]) -> int:
        if self.decoding.user is not self:
            self.clear()
        self.decoding.user = self
        return super().reuse(input_ids)

    def _cut(self, keep: int) -> None:
        if keep == 0:
            self.key_values.reset()
        else:
            for layer in self.key_values.layers:  # what stands behind is masked until it is written over
                layer.cumulative_length.fill_(keep)


def common_prefix_length(first: list[int], second: list[int]) -> int:
    return len(os.path.commonprefix([first, second]))  # made for paths, right for any two sequences


def new_cache(model) -> PromptCache:
    """An empty cache for a conversation with `model`."""
    decoding = compiled_decoding(model)
    return PromptCache() if decoding is None else StaticPromptCache(decoding)


def compiled_decoding(model) -> CompiledDecoding | None:
    """What `compile_decoding` has given to the model; None if it is not compiled."""
    return getattr(model, "compiled_decoding", None)  # PEFT looks in its base


def compile_decoding(model, length: int = STATIC_TOKENS) -> None:
    """From now on `chat`, `stream_chat` and `ChatSession` decode with torch.compile and a KV cache of fixed length.

    Nothing is compiled before the first reply, which takes about a minute longer. Training and evaluation stay as
    they are. `HelpersError` if the model or this machine cannot do it.

    Args:
        length: most tokens that prompt and reply together may have; not more than the model's context.
    """
    if getattr(model, "is_quantized", False):
        raise HelpersError(QUANTIZED_OR_COMPILED)
    placed = getattr(model, "hf_device_map", {}).values() or [model.device]
    # "cpu", "cuda", "disk", ...; transformers numbers the GPUs.
    places = {"cuda" if isinstance(place, int) else str(place).partition(":")[0] for place in placed}
    if places not in ({"cpu"}, {"cuda"}):
        raise HelpersError(
            f"模型在 {'、'.join(sorted(places))} 上，不能编译 [cannot compile here]：要全部在 CPU 上，或全部在 CUDA GPU 上"
        )
    if missing := _missing_tools(*places):
        raise HelpersError(
            f"torch.compile 缺少 {'、'.join(missing)} [cannot compile: tools missing]："
            "Debian / Ubuntu 上 apt-get install -y g++ python3-dev；triton 随 CUDA 版的 torch 一起来。或去掉 compile=True"
        )
    model.compiled_decoding = CompiledDecoding(model, min(length, model.config.max_position_embeddings))


def _missing_tools(device: str) -> list[str]:
    """What torch.compile needs on "cpu" or "cuda" and does not find: torch itself says so only at the first reply."""
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "cl"]
    found = {
        "C++ 编译器 [C++ compiler]": any(map(shutil.which, compilers)),
        "Python.h": (Path(sysconfig.get_path("include")) / "Python.h").is_file(),
        "triton": device != "cuda" or importlib.util.find_spec("triton") is not None,
    }
    return [name for name, present in found.items() if not present]
