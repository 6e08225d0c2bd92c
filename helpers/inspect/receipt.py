"""The run receipt: what ran, on which versions, device, model files and parameters, and what came out."""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import HelpersError
from ..paths import PROJECT_DIR, write_json

HASH_LIMIT_BYTES = 100_000_000
RECORDED_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "accelerate", "datasets", "modelscope")
PROJECT_PACKAGE = "characterglm-notebooks"
# Parts of a receipt and what a comparison calls them.
SECTIONS = {"notebook": "notebook", "versions": "版本", "device": "设备", "model": "模型"}
SECTIONS |= {"parameters": "参数", "metrics": "结果"}
ABSENT = "（没有）"


class ReceiptError(HelpersError, ValueError):
    """A value cannot be written into a receipt."""


def write_receipt(
    output_dir: str | Path,
    notebook: str | int,
    *,
    model_dir: str | Path | None,
    parameters: dict[str, Any],
    metrics: dict[str, Any],
) -> Path:
    """Write `receipt_01.json` for notebook "01" into `output_dir` and return its path.

    Model files of 100 MB and more are recorded by name and size only, smaller ones also by sha256.
    Absolute paths in parameters and metrics are shortened: below the project to a relative path, elsewhere
    to the last name. The file appears complete or not at all. Raises ReceiptError for a value that JSON
    cannot hold, NaN included.
    """
    receipt = {
        "notebook": notebook_number(notebook),
        "time_utc": utc_now(),
        "versions": collect_versions(),
        "device": describe_device(),
        "model": {"name": Path(model_dir).name, "files": describe_files(model_dir)} if model_dir else None,
        "parameters": checked(parameters, "parameters"),
        "metrics": checked(metrics, "metrics"),
    }
    return write_json(receipt_path(output_dir, notebook), receipt)


def receipt_path(output_dir: str | Path, notebook: str | int) -> Path:
    """Where the receipt of a notebook ("01", 1 or "01_name") lies."""
    return Path(output_dir) / f"receipt_{notebook_number(notebook)}.json"


def notebook_number(notebook: str | int) -> str:
    """The two-digit number of a notebook: 1, "01" and "01_transformers_deploy" all give "01"."""
    number = str(notebook).split("_")[0]
    if not number.isdecimal():
        raise ReceiptError(f"notebook 要以编号开头 [a notebook starts with its number]：{notebook!r}")
    return number.zfill(2)


def utc_now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def collect_versions() -> dict[str, str | None]:
    """Versions of Python, the packages that matter and this project; None for what is not installed."""
    names = {"helpers": PROJECT_PACKAGE} | {name: name for name in RECORDED_PACKAGES}
    return {"python": platform.python_version()} | {key: _version(name) for key, name in names.items()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_device() -> dict[str, Any]:
    """Type, name and memory (GiB) of the first CUDA GPU, else of the CPU and the machine."""
    import psutil
    import torch

    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return {"type": "cuda", "name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)}
    memory = round(psutil.virtual_memory().total / 2**30, 1)
    return {"type": "cpu", "name": _cpu_name(), "memory_gib": memory, "cores": os.cpu_count()}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_files(model_dir: str | Path) -> list[dict[str, Any]]:
    """Name, size in bytes and (below 100 MB) sha256 of the files of a model directory, in order of name."""
    folder = Path(model_dir)
    if not folder.is_dir():
        raise ReceiptError(f"找不到模型目录 [model directory not found]：{folder.name}")
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    return [_describe_file(file) for file in files]


def _describe_file(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    entry: dict[str, Any] = {"name": file.name, "bytes": size}
    if size < HASH_LIMIT_BYTES:
        entry["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return entry


def checked(value: Any, where: str) -> Any:
    """A copy of `value` that JSON can hold, paths shortened; ReceiptError names the place that it cannot."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return shorten_paths(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ReceiptError(f"{where} = {value} 不是有限的数 [not finite]：请检查它是怎么算出来的")
        return float(value)
    if isinstance(value, Path):
        return shorten_paths(str(value))
    if isinstance(value, list | tuple):
        return [checked(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict):
        return {_checked_key(key, where): checked(item, f"{where}.{key}") for key, item in value.items()}
    raise ReceiptError(
        f"{where} 的类型 {type(value).__name__} 不能写进 JSON [not serialisable]：请先转成数、字符串或列表，如 float(x)"
    )


def _checked_key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise ReceiptError(f"{where} 的键 {key!r} 不是字符串 [keys must be strings]：请写 str(...)")
    return key


def shorten_paths(text: str) -> str:
    """`text` without anybody's absolute paths: they tell another reader nothing, but do tell who ran it."""
    path = Path(text)
    if len(text) < 1000 and path.is_absolute() and Path(*path.parts[:2]).is_dir():
        return str(path.relative_to(PROJECT_DIR)) if path.is_relative_to(PROJECT_DIR) else path.name
    return text.replace(f"{PROJECT_DIR}/", "").replace(f"{Path.home()}/", "~/")


def compare_receipts(first: str | Path, second: str | Path) -> list[tuple[str, str, str, str]]:
    """What differs between two receipts: (section, name, in the first, in the second); the time of the run is left out.

    Raises ReceiptError if one is not a receipt.
    """
    found = [_leaves(read_receipt(path)) for path in (first, second)]
    keys = [key for key in found[0] | found[1] if found[0].get(key, ABSENT) != found[1].get(key, ABSENT)]
    sections = list(SECTIONS)
    rows = [(*key, *(str(leaves.get(key, ABSENT)) for leaves in found)) for key in keys]
    return sorted(rows, key=lambda row: sections.index(row[0]))


def read_receipt(path: str | Path) -> dict[str, Any]:
    """The content of a receipt; ReceiptError if the file is missing or is none."""
    try:
        receipt = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ReceiptError(f"读不了 {path} [cannot read]：{error.strerror}") from None
    except ValueError:
        receipt = None
    if not isinstance(receipt, dict) or not receipt.keys() >= SECTIONS.keys():
        raise ReceiptError(f"{path} 不是回执 [not a receipt]：请给 write_receipt 写的 receipt_NN.json")
    return receipt


def _leaves(receipt: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """(section, dotted name) -> value; the model's files by name, so that one more file is one difference."""
    model = dict(receipt["model"] or {})
    model |= {file.pop("name"): file for file in model.pop("files", [])}
    return {
        (section, name): value
        for section in SECTIONS
        for name, value in _flatten("", model if section == "model" else receipt[section])
    }


def _flatten(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict | list):
        yield name, value
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _flatten(f"{name}.{key}" if name else str(key), item)


def is_measurement(section: str, name: str) -> bool:
    """Whether a value differs from run to run even if nothing changed: seconds and memory in use."""
    return section == "metrics" and any(word in name for word in ("second", "memory"))
