"""The run receipt: what ran, on which versions, device, model files and parameters, and what came out."""

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, JsonValue, TypeAdapter, ValidationError

from ..errors import HelpersError
from ..paths import PROJECT_DIR, write_json

HASH_LIMIT_BYTES = 100_000_000
PROJECT_PACKAGE = "characterglm-notebooks"
RECORDED_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "accelerate", "datasets", "modelscope")
# Parts of a receipt and what a comparison calls them.
SECTIONS = {"notebook": "notebook", "versions": "版本", "device": "设备", "model": "模型"}
SECTIONS |= {"parameters": "参数", "metrics": "结果"}
ABSENT = "（没有）"
JSON = TypeAdapter(dict[str, JsonValue], config=ConfigDict(allow_inf_nan=False))
REFUSED = {  # pydantic's name of an error: what it means here
    "finite_number": "{place} = {value} 不是有限的数 [not finite]：请检查它是怎么算出来的",
    "string_type": "{place} 的键 {value!r} 不是字符串 [keys must be strings]：请写 str(...)",
    "invalid-json-value": "{place} 的类型 {kind} 不能写进 JSON [not serialisable]：请先转成数、字符串或列表，如 float(x)",
}


class ReceiptError(HelpersError, ValueError):
    """A value cannot be written into a receipt, or a file is no receipt."""


def write_receipt(
    output_dir: str | Path,
    notebook: str | int,
    *,
    model_dir: str | Path | None,
    parameters: dict[str, Any],
    metrics: dict[str, Any],
) -> Path:
    """Write `receipt_01.json` for notebook "01" into `output_dir` and return its path.

    Model files of 100 MB and more are recorded by name and size only, smaller ones also by sha256. Absolute paths in
    parameters and metrics are shortened: below the project to a relative path, elsewhere to the last name.

    Raises:
        ReceiptError: a value that JSON cannot hold, NaN included. An earlier receipt is then kept.
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
    """Versions of Python, this project and the packages that matter; None for what is not installed."""
    packages = {"helpers": PROJECT_PACKAGE} | {name: name for name in RECORDED_PACKAGES}
    found = {name: next(iter(distributions(name=package)), None) for name, package in packages.items()}
    return {"python": platform.python_version()} | {name: one and one.version for name, one in found.items()}


def describe_device() -> dict[str, Any]:
    """Type, name and memory (GiB) of the first CUDA GPU, else of the CPU and the machine."""
    import psutil
    import torch

    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return {"type": "cuda", "name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)}
    cpuinfo = Path("/proc/cpuinfo")  # on Linux platform.processor() is often empty
    line = re.search(r"model name\s*: (.+)", cpuinfo.read_text(errors="replace")) if cpuinfo.exists() else None
    name = line[1] if line else platform.processor() or platform.machine()
    memory = round(psutil.virtual_memory().total / 2**30, 1)
    return {"type": "cpu", "name": name, "memory_gib": memory, "cores": os.cpu_count()}


def describe_files(model_dir: str | Path) -> list[dict[str, Any]]:
    """Name, size in bytes and (below 100 MB) sha256 of the files of a model directory, in order of name."""
    folder = Path(model_dir)
    if not folder.is_dir():
        raise ReceiptError(f"找不到模型目录 [model directory not found]：{folder.name}")
    entries = []
    for file in sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")):
        entries.append({"name": file.name, "bytes": file.stat().st_size})
        if entries[-1]["bytes"] < HASH_LIMIT_BYTES:
            entries[-1]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return entries


def checked(values: dict[str, Any], where: str) -> dict[str, Any]:
    """A copy of `values` that JSON can hold, paths shortened; ReceiptError names the place that it cannot."""
    try:
        return JSON.validate_python(map_texts(values, shorten_paths))
    except ValidationError as failure:
        error = failure.errors()[0]
    names = [part for part in error["loc"] if part not in ("dict", "list", "float", "[key]")]  # pydantic's own words
    place, value = ".".join(map(str, [where, *names])), error["input"]
    raise ReceiptError(REFUSED[error["type"]].format(place=place, value=value, kind=type(value).__name__))


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of `value` with every text and path in it changed; pictures (keys `image/...`) are left alone."""
    if isinstance(value, str | Path):
        return change(str(value))
    if isinstance(value, list | tuple):
        return [map_texts(item, change) for item in value]
    if isinstance(value, dict):
        pictures = {key for key in value if str(key).startswith("image/") and key != "image/svg+xml"}
        return {key: item if key in pictures else map_texts(item, change) for key, item in value.items()}
    return value


def shorten_paths(text: str) -> str:
    """`text` without anybody's absolute paths: they tell another reader nothing, but do tell who ran it."""
    path = Path(text)
    if len(text) < 1000 and path.is_absolute() and Path(*path.parts[:2]).is_dir():
        return str(path.relative_to(PROJECT_DIR)) if path.is_relative_to(PROJECT_DIR) else path.name
    return text.replace(f"{PROJECT_DIR}/", "").replace(f"{Path.home()}/", "~/")


def compare_receipts(first: str | Path, second: str | Path) -> list[tuple[str, str, str, str]]:
    """What differs between two receipts: (section, name, in the first, in the second); the time of the run is left out.

    Raises:
        ReceiptError: a file is missing or is no receipt.
    """
    left, right = (_values(read_receipt(path)) for path in (first, second))
    keys = sorted(left | right, key=lambda key: list(SECTIONS).index(key[0]))
    rows = [(*key, str(left.get(key, ABSENT)), str(right.get(key, ABSENT))) for key in keys]
    return [row for row in rows if row[2] != row[3]]


def read_receipt(path: str | Path) -> dict[str, Any]:
    """The sections of a receipt; ReceiptError if the file is missing or is none."""
    try:
        receipt = json.loads(Path(path).read_text(encoding="utf-8"))
        return {section: receipt[section] for section in SECTIONS}
    except OSError as error:
        raise ReceiptError(f"读不了 {path} [cannot read]：{error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise ReceiptError(f"{path} 不是收据 [not a receipt]：请给 write_receipt 写的 receipt_NN.json") from None


def _values(receipt: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """(section, dotted name) -> value; the model's files by name, so that one more file is one difference."""
    model = dict(receipt["model"] or {})
    receipt["model"] = model | {file.pop("name"): file for file in model.pop("files", [])}
    return {(section, name): value for section in SECTIONS for name, value in _flat("", receipt[section])}


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield name, value
    for key, item in items or ():
        yield from _flat(f"{name}.{key}" if name else str(key), item)


def is_measurement(section: str, name: str) -> bool:
    """Whether a value differs from run to run even if nothing changed: seconds and memory in use."""
    return section == "metrics" and any(word in name for word in ("second", "memory"))
