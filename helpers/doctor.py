"""The preflight: is this machine ready? Each check says OK or what to do.

`preflight` is the short form that notebooks show; `examine` adds what matters before the first notebook: libraries,
driver, GPU memory for each notebook, disk, port 6006 and the JupyterLab kernel.
"""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from .checkpoint import verify_checkpoint
from .download import bytes_needed, default_model_dir, find_downloaded, free_bytes
from .errors import CheckpointError
from .estimate import RESERVE_GIB, estimate
from .loading import MIN_GPU_GIB, NANO_DIR, gpu_gib, pick_model
from .network import DEFAULT_PORT, port_is_free
from .receipt import PROJECT_DIR

MIN_VERSIONS = {"torch": (2, 6), "transformers": (5, 23)}
# What the notebooks do with the 6B: name, task and options for `estimate`.
NOTEBOOK_TASKS = {
    "01-03 聊天": ("chat", {"tokens": 4096}),
    "04 LoRA": ("lora", {"batch": 4, "tokens": 512}),
}


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
            check_python(),
            *(check_version(library, minimum) for library, minimum in MIN_VERSIONS.items()),
            check_device(name, reason),
            check_model_files(name),
        ]
    )


def examine(model="auto") -> Preflight:
    """Every check there is: `preflight`, and what else decides whether all notebooks will run."""
    others = [check_libraries(), check_driver(), *check_gpu_memory(), check_disk(), check_port(), check_kernel()]
    return Preflight([*preflight(model), *others])


def check_python() -> Check:
    """Python is 3.11 or newer, as transformers 5 needs it."""
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("Python", version, "" if sys.version_info >= (3, 11) else "需要 Python >= 3.11：换一个更新的镜像")


def check_version(library: str, minimum: tuple[int, int]) -> Check:
    """A library is not older than `minimum`."""
    version = importlib.metadata.version(library)
    new_enough = tuple(map(int, version.split(".")[:2])) >= minimum
    needed = ".".join(map(str, minimum))
    return Check(
        library, version, "" if new_enough else f"需要 {library} >= {needed}：运行 make run，或换一个更新的镜像"
    )


def check_libraries(requirements: Path = PROJECT_DIR / "requirements.txt") -> Check:
    """Every library is installed in the range it was tested in (requirements.txt)."""
    lines = [line.split("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines()]
    wanted = [Requirement(line) for line in lines if line]
    problems = [problem for requirement in wanted if (problem := _problem(requirement))]
    if not problems:
        return Check("依赖库", f"{len(wanted)} 个都在测试过的范围内")
    return Check("依赖库", "；".join(problems), "运行 make setup，并确认用的是 .venv 里的 Python")


def _problem(requirement: Requirement) -> str:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"没有 {requirement.name}"
    return (
        "" if requirement.specifier.contains(version) else f"{requirement.name} {version} 不在 {requirement.specifier}"
    )


def check_device(name: str, reason: str) -> Check:
    """The device is large enough for the model."""
    memory = gpu_gib()
    found = f"{torch.cuda.get_device_name(0)}，{memory:.0f} GiB" if memory else f"CPU，{psutil.cpu_count()} 核"
    if name == "6b" and memory < MIN_GPU_GIB:
        return Check("设备", found, f"6b 要 {MIN_GPU_GIB} GiB 显存：租一块 24 GB 的 GPU，或用 MODEL='nano'")
    return Check("设备", f"{found}；{reason}")


def check_driver() -> Check:
    """torch can use the GPU that the driver sees."""
    built_for = torch.version.cuda
    build = f"torch 的 CUDA {built_for}" if built_for else "CPU 版 torch"
    driver = driver_cuda()
    if driver is None:
        return Check("CUDA 与驱动", f"{build}，没有 NVIDIA 驱动")
    found = f"{build}，驱动支持到 CUDA {driver}"
    if torch.cuda.is_available():
        return Check("CUDA 与驱动", found)
    if not built_for:
        return Check("CUDA 与驱动", found, "装成了 CPU 版 torch：删掉 .venv 重新 make run，沿用镜像自带的 torch")
    if _numbers(built_for) > _numbers(driver):
        return Check("CUDA 与驱动", found, "torch 比驱动新：换回镜像自带的 torch，或租 CUDA 更高的机器")
    return Check("CUDA 与驱动", found, "看得到驱动，但没有可用的 GPU：可能是无卡模式，以有卡模式重新开机")


def driver_cuda() -> str | None:
    """The newest CUDA that the NVIDIA driver supports, as nvidia-smi prints it; None without a driver."""
    if not shutil.which("nvidia-smi"):
        return None
    try:
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"CUDA Version:\s*([\d.]+)", done.stdout)
    return match[1] if match else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def check_gpu_memory() -> list[Check]:
    """What each notebook needs for the 6B, against the GPU there is; nothing to do without a GPU."""
    memory = gpu_gib()
    checks = []
    for name, (task, options) in NOTEBOOK_TASKS.items():
        needed = estimate(task, "6b", **options, gpu=memory or None)
        found = f"估计 {needed.gib:.1f} GiB，另留 {RESERVE_GIB:g}" + (
            f"；GPU 有 {memory:.1f}" if memory else "；没有 GPU"
        )
        advice = "显存不够：换 24 GB 的 GPU，或用 quantization='nf4'" if memory and not needed.fits else ""
        checks.append(Check(f"6b 显存 {name}", found, advice))
    return checks


def check_model_files(name: str) -> Check:
    """The files of the model are there and whole, or there is room for them."""
    if name == "6b":
        if directory := find_downloaded():
            return Check("模型文件", directory.name)
        fetch = "运行 python -m helpers download（notebook 01 的第 2 步也会下载）"
        return Check("模型文件", "尚未下载", check_disk().advice or fetch)
    directory = NANO_DIR if name == "nano" else Path(name)
    try:
        files = verify_checkpoint(directory)
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


def check_port(port: int = DEFAULT_PORT) -> Check:
    """Nobody listens on the port that the server and the demo use."""
    if port_is_free("127.0.0.1", port):
        return Check(f"端口 {port}", "空闲")
    return Check(f"端口 {port}", f"被 {_who_listens(port)} 占用", "停掉它，或换一个端口：--port 6008")


def _who_listens(port: int) -> str:
    try:
        pids = {
            c.pid for c in psutil.net_connections("inet") if c.laddr and c.laddr.port == port and c.status == "LISTEN"
        }
        processes = [psutil.Process(pid) for pid in pids if pid]
        return "、".join(f"{p.name()}（进程 {p.pid}）" for p in processes) or "另一个进程"
    except psutil.Error:
        return "另一个进程"  # of another user: only root sees whose it is


def check_kernel() -> Check:
    """JupyterLab has a kernel that runs this Python."""
    from jupyter_client.kernelspec import KernelSpecManager

    specs = KernelSpecManager().get_all_specs()
    here = {name for name, spec in specs.items() if _same_python(spec["spec"].get("argv") or [""])}
    if here:
        return Check("JupyterLab kernel", f"{'、'.join(sorted(here))} 用的是这个 Python")
    found = "、".join(sorted(specs)) or "一个也没有"
    return Check(
        "JupyterLab kernel", f"{found}，都不是这个 Python", "运行 make kernel，再在 JupyterLab 里选 CharacterGLM"
    )


def _same_python(command: list[str]) -> bool:
    # By folder: .venv/bin/python is itself a link to the Python that the environment was made from.
    here = Path(sys.executable).parent.resolve()
    return command[0] in ("python", "python3") or Path(command[0]).parent.resolve() == here


def memory() -> dict[str, float]:
    """Memory in use, in GiB: of this process ("内存"), and on the GPU now and at its peak, if there is one."""
    used = {"内存": psutil.Process().memory_info().rss / 2**30}
    if torch.cuda.is_available():
        used["显存"] = torch.cuda.memory_allocated() / 2**30
        used["显存峰值"] = torch.cuda.max_memory_allocated() / 2**30
    return used
