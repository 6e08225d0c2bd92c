"""The doctor: is this machine ready for all notebooks? `preflight`, and what matters before the first notebook."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from ..inspect.estimate import RESERVE_GIB, estimate
from ..inspect.preflight import Check, Preflight, check_disk, preflight
from ..model.loading import gpu_gib
from ..network import DEFAULT_PORT, port_is_free
from ..paths import PROJECT_DIR

# What the notebooks do with the 6B: name, task and options for `estimate`.
NOTEBOOK_TASKS = {
    "01-03 聊天": ("chat", {"tokens": 4096}),
    "04 LoRA": ("lora", {"batch": 4, "tokens": 512}),
}


def examine(model="auto") -> Preflight:
    """Every check there is: `preflight`, and what else decides whether all notebooks will run."""
    others = [check_libraries(), check_driver(), *check_gpu_memory(), check_disk(), check_port(), check_kernel()]
    return Preflight([*preflight(model), *others])


def check_libraries(requirements: Path = PROJECT_DIR / "requirements.txt") -> Check:
    """Every library is installed in the range it was tested in (requirements.txt)."""
    lines = [line.split("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines()]
    wanted = [Requirement(line) for line in lines if line and not line.startswith("-")]
    problems = [problem for requirement in wanted if (problem := _problem(requirement))]
    if not problems:
        return Check("依赖库", f"{len(wanted)} 个都在测试过的范围内")
    return Check("依赖库", "；".join(problems), "运行 make setup，并确认用的是 .venv 里的 Python")


def _problem(wanted: Requirement) -> str:
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        return f"没有 {wanted.name}"
    return "" if wanted.specifier.contains(found) else f"{wanted.name} {found} 不在 {wanted.specifier}"


def check_driver() -> Check:
    """torch can use the GPU that the driver sees."""
    built_for, driver = torch.version.cuda, driver_cuda()
    found = f"torch 的 CUDA {built_for}" if built_for else "CPU 版 torch"
    if driver is None:
        return Check("CUDA 与驱动", f"{found}，没有 NVIDIA 驱动")
    if torch.cuda.is_available():
        advice = ""
    elif not built_for:
        advice = "装成了 CPU 版 torch：删掉 .venv 重新 make run，沿用镜像自带的 torch"
    elif Version(built_for) > Version(driver):
        advice = "torch 比驱动新：换回镜像自带的 torch，或租 CUDA 更高的机器"
    else:
        advice = "看得到驱动，但没有可用的 GPU：可能是无卡模式，以有卡模式重新开机"
    return Check("CUDA 与驱动", f"{found}，驱动支持到 CUDA {driver}", advice)


def driver_cuda() -> str | None:
    """The newest CUDA that the NVIDIA driver supports, as nvidia-smi prints it; None without a driver."""
    try:
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"CUDA Version:\s*([\d.]+)", done.stdout)
    return match[1] if match else None


def check_gpu_memory() -> list[Check]:
    """What each notebook needs for the 6B, against the GPU there is; nothing to do without a GPU."""
    memory = gpu_gib()
    have = f"GPU 有 {memory:.1f}" if memory else "没有 GPU"
    checks = []
    for name, (task, options) in NOTEBOOK_TASKS.items():
        needed = estimate(task, "6b", **options, gpu=memory or None)
        advice = "显存不够：换 24 GB 的 GPU，或用 quantization='nf4'" if memory and not needed.fits else ""
        found = f"估计 {needed.gib:.1f} GiB，另留 {RESERVE_GIB:g}；{have}"
        checks.append(Check(f"6b 显存 {name}", found, advice))
    return checks


def check_port(port: int = DEFAULT_PORT) -> Check:
    """Nobody listens on the port that the server and the demo use."""
    if port_is_free("127.0.0.1", port):
        return Check(f"端口 {port}", "空闲")
    return Check(f"端口 {port}", f"被 {_who_listens(port)} 占用", "停掉它，或换一个端口：--port 6008")


def _who_listens(port: int) -> str:
    try:
        found = {c.pid for c in psutil.net_connections("inet") if c.laddr[1:] == (port,) and c.status == "LISTEN"}
        processes = [psutil.Process(pid) for pid in found if pid]
        return "、".join(f"{p.name()}（进程 {p.pid}）" for p in processes) or "另一个进程"
    except psutil.Error:
        return "另一个进程"  # of another user: only root sees whose it is


def check_kernel() -> Check:
    """JupyterLab has a kernel that runs this Python."""
    from jupyter_client.kernelspec import KernelSpecManager

    kernels = KernelSpecManager().get_all_specs()
    here = sorted(name for name, kernel in kernels.items() if _is_this_python(kernel["spec"].get("argv") or [""]))
    if here:
        return Check("JupyterLab kernel", f"{'、'.join(here)} 用的是这个 Python")
    found = f"{'、'.join(sorted(kernels)) or '一个也没有'}，都不是这个 Python"
    return Check("JupyterLab kernel", found, "运行 make kernel，再在 JupyterLab 里选 CharacterGLM")


def _is_this_python(command: list[str]) -> bool:
    # By folder: .venv/bin/python is itself a link to the Python that the environment was made from.
    here = Path(sys.executable).parent.resolve()
    return command[0] in ("python", "python3") or Path(command[0]).parent.resolve() == here
