"""The preflight that notebooks show: is this machine ready? Each check says OK or what to do."""

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from ..errors import CheckpointError
from ..model.checkpoint import check_checkpoint
from ..model.download import bytes_needed, default_model_dir, find_downloaded
from ..model.loading import MIN_GPU_GIB, NANO_DIR, gpu_gib, pick_model
from ..paths import free_bytes

OLDEST_LIBRARIES = ("torch>=2.6", "transformers>=5.23")


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
        import pandas

        with pandas.option_context("display.max_colwidth", None):  # pandas cuts texts after 50 characters
            table = self._table().to_html(index=False, justify="left")
        return table.replace("<td>", '<td style="text-align: left">')  # Jupyter aligns cells to the right

    def __repr__(self) -> str:
        return self._table().to_string(index=False)

    def _table(self):
        import pandas

        return pandas.DataFrame([(c.name, c.found, c.advice or "OK") for c in self], columns=["项目", "现状", "结论"])


def preflight(model="auto") -> Preflight:
    """Check Python, libraries, device, memory, disk and model files for running `model` ("auto", "nano", "6b", path)."""
    name, reason = pick_model(model)
    python = Check("Python", platform.python_version())  # an older one than 3.11 has stopped at the imports
    libraries = map(check_version, OLDEST_LIBRARIES)
    return Preflight([python, *libraries, check_device(name, reason), check_model_files(name)])


def check_version(requirement: str) -> Check:
    """A library is not older than `requirement` says ("torch>=2.6")."""
    wanted = Requirement(requirement)
    found = version(wanted.name)
    new_enough = wanted.specifier.contains(found, prereleases=True)  # NVIDIA's images bring torch 2.x.0a0
    advice = f"需要 {requirement.replace('>=', ' >= ')}：运行 make run，或换一个更新的镜像"
    return Check(wanted.name, found, "" if new_enough else advice)


def check_device(name: str, reason: str) -> Check:
    """The device is large enough for the model."""
    memory = gpu_gib()
    found = f"{torch.cuda.get_device_name(0)}，{memory:.0f} GiB" if memory else f"CPU，{psutil.cpu_count()} 核"
    if name == "6b" and memory < MIN_GPU_GIB:
        return Check("设备", found, f"6b 要 {MIN_GPU_GIB} GiB 显存：租一块 24 GB 的 GPU，或用 MODEL='nano'")
    return Check("设备", f"{found}；{reason}")


def check_model_files(name: str) -> Check:
    """The files of the model are there and whole, or there is room for them."""
    if name == "6b":
        if directory := find_downloaded():
            return Check("模型文件", directory.name)
        fetch = "运行 python -m helpers download（notebook 01 的第 2 步也会下载）"
        return Check("模型文件", "尚未下载", check_disk().advice or fetch)
    directory = NANO_DIR if name == "nano" else Path(name)
    try:
        files = check_checkpoint(directory)
    except CheckpointError as error:
        return Check("模型文件", name, str(error))
    return Check("模型文件", f"{directory.name}，权重 {sum(f.stat().st_size for f in files) / 1e6:,.1f} MB")


def check_disk() -> Check:
    """There is room for the 6B, by the same bound that the download uses, unless it is there already."""
    target = default_model_dir()
    free, needed = free_bytes(target), bytes_needed(target)
    found = f"{target.parent} 所在磁盘剩 {free / 1e9:.1f} GB"
    if find_downloaded():
        return Check("磁盘", f"{found}，6b 已下载")
    return Check("磁盘", found, "" if free >= needed else f"下载 6b 还要 {needed / 1e9:.1f} GB：清理数据盘或扩容")


def memory() -> dict[str, float]:
    """Memory in use, in GiB: of this process ("内存"), and on the GPU now and at its peak, if there is one."""
    used = {"内存": psutil.Process().memory_info().rss / 2**30}
    if torch.cuda.is_available():
        used["显存"] = torch.cuda.memory_allocated() / 2**30
        used["显存峰值"] = torch.cuda.max_memory_allocated() / 2**30
    return used
