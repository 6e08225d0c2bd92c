"""The preflight: is this machine ready for a notebook? Each check says OK or what to do."""

import importlib.metadata
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from .checkpoint import verify_checkpoint
from .download import bytes_needed, default_model_dir, find_downloaded, free_bytes
from .errors import CheckpointError
from .loading import MIN_GPU_GIB, NANO_DIR, gpu_gib, pick_model

MIN_VERSIONS = {"torch": (2, 6), "transformers": (5, 23)}


@dataclass(frozen=True)
class Check:
    """One row of the preflight: what was looked at, what was found, and what to do ("" if all is well)."""

    name: str
    found: str
    advice: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing has to be done."""
        return not self.advice


class Preflight(list):
    """The checks of `preflight`, shown as a table in a notebook."""

    def _repr_html_(self) -> str:
        return self._table().to_html(index=False)

    def __repr__(self) -> str:
        return self._table().to_string(index=False)

    def _table(self):
        import pandas

        return pandas.DataFrame([(c.name, c.found, c.advice or "OK") for c in self], columns=["项目", "现状", "结论"])


def preflight(model="auto") -> Preflight:
    """Check Python, libraries, device, memory, disk and model files for running `model` ("auto", "nano", "6b", path)."""
    name, reason = pick_model(model)
    return Preflight(
        [
            _python(),
            *(_library(library, minimum) for library, minimum in MIN_VERSIONS.items()),
            _device(name, reason),
            _model_files(name),
        ]
    )


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("Python", version, "" if sys.version_info >= (3, 11) else "需要 Python >= 3.11：换一个更新的镜像")


def _library(library: str, minimum: tuple[int, int]) -> Check:
    version = importlib.metadata.version(library)
    new_enough = tuple(map(int, version.split(".")[:2])) >= minimum
    needed = ".".join(map(str, minimum))
    return Check(
        library, version, "" if new_enough else f"需要 {library} >= {needed}：运行 make run，或换一个更新的镜像"
    )


def _device(name: str, reason: str) -> Check:
    memory = gpu_gib()
    found = f"{torch.cuda.get_device_name(0)}，{memory:.0f} GiB" if memory else f"CPU，{psutil.cpu_count()} 核"
    if name == "6b" and memory < MIN_GPU_GIB:
        return Check("设备", found, f"6b 要 {MIN_GPU_GIB} GiB 显存：租一块 24 GB 的 GPU，或用 MODEL='nano'")
    return Check("设备", f"{found}；{reason}")


def _model_files(name: str) -> Check:
    if name == "6b":
        directory = find_downloaded()
        return Check("模型文件", directory.name) if directory else _disk_for_download()
    directory = NANO_DIR if name == "nano" else Path(name)
    try:
        files = verify_checkpoint(directory)
    except CheckpointError as error:
        return Check("模型文件", name, str(error))
    return Check("模型文件", f"{directory.name}，权重 {sum(f.stat().st_size for f in files) / 1e6:,.1f} MB")


def _disk_for_download() -> Check:
    free, needed = free_bytes(default_model_dir()), bytes_needed(default_model_dir())
    found = f"尚未下载；磁盘剩 {free / 1e9:.1f} GB"
    return Check("模型文件", found, "" if free >= needed else f"下载还要 {needed / 1e9:.1f} GB：清理数据盘或扩容")


def memory() -> dict[str, float]:
    """Memory in use, in GiB: of this process ("内存"), and on the GPU now and at its peak, if there is one."""
    used = {"内存": psutil.Process().memory_info().rss / 2**30}
    if torch.cuda.is_available():
        used["显存"] = torch.cuda.memory_allocated() / 2**30
        used["显存峰值"] = torch.cuda.max_memory_allocated() / 2**30
    return used
