"""Is this directory a complete CharacterGLM checkpoint? Cheap checks on the files, and clear errors when one fails."""

import json
import struct
import zipfile
from contextlib import contextmanager
from pathlib import Path

from .errors import CheckpointError, HelpersError

WEIGHT_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
REDOWNLOAD = "请重新下载这个文件：python -m helpers download（已完整的文件不会重复下载）"


def read_json(path: Path) -> dict:
    """The JSON object in `path`; `CheckpointError` if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"缺少文件 {path.name} [missing file]：{path}。{REDOWNLOAD}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path.name} 不是有效的 JSON [invalid JSON]：{path}（{error}）。{REDOWNLOAD}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} 的内容不是 JSON 对象 [not a JSON object]：{path}。{REDOWNLOAD}")
    return content


def verify_checkpoint(directory: Path) -> list[Path]:
    """Check that `directory` holds a complete CharacterGLM checkpoint and return its weight files.

    Reads the JSON files and the first and last bytes of the weight files, so it takes milliseconds on 12.5 GB.

    Raises:
        CheckpointError: naming the file at fault and the way out.
    """
    if not directory.is_dir():
        raise CheckpointError(f"找不到模型目录 [model directory not found]：{directory}。先运行 python -m helpers download")
    if not any(directory.iterdir()):
        raise CheckpointError(f"模型目录是空的 [empty directory]：{directory}。先运行 python -m helpers download")
    config = read_json(directory / "config.json")
    if config.get("model_type") != "chatglm":
        raise CheckpointError(
            f"这不是 CharacterGLM 的模型目录 [not a CharacterGLM directory]：{directory} 的 config.json 里 "
            f"model_type={config.get('model_type')!r}，应为 'chatglm'"
        )
    files = weight_files(directory)
    for file in files:
        verify_weight_file(file)
    return files


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a checkpoint, safetensors before `.bin`, as transformers prefers them."""
    for single, index in zip(WEIGHT_FILES, WEIGHT_INDEXES):
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            weight_map = read_json(directory / index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index} 里没有 weight_map [invalid index]：{directory / index}。{REDOWNLOAD}")
            return [directory / name for name in sorted(set(weight_map.values()))]
    raise CheckpointError(
        f"目录里没有权重文件 [no weight files]：{directory}，"
        f"需要 {WEIGHT_INDEXES[1]} 和它列出的分片，或 model.safetensors。{REDOWNLOAD}"
    )


def verify_weight_file(file: Path) -> None:
    """Raise `CheckpointError` if `file` is missing or was cut short."""
    if not file.is_file():
        raise CheckpointError(f"缺少权重分片 {file.name} [missing shard]：{file}。{REDOWNLOAD}")
    intact = _safetensors_intact(file) if file.suffix == ".safetensors" else _torch_archive_intact(file)
    if not intact:
        raise CheckpointError(
            f"权重文件 {file.name} 不完整或已损坏 [truncated or corrupt]：{file}，"
            f"现有 {file.stat().st_size:,} 字节。{REDOWNLOAD}"
        )


def _torch_archive_intact(file: Path) -> bool:
    # A torch checkpoint is a zip archive, whose table of contents is at the end: a cut file has none.
    return zipfile.is_zipfile(file)


def _safetensors_intact(file: Path) -> bool:
    # 8 bytes of header length, the header, then the data up to the largest offset in the header.
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            return False
        (length,) = struct.unpack("<Q", start)
        if 8 + length > file.stat().st_size:
            return False
        header = json.loads(stream.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return file.stat().st_size == 8 + length + max(ends, default=0)


@contextmanager
def explain_load_error(directory):
    """Turn what transformers and torch raise while reading weights into a `CheckpointError` that says what to do."""
    try:
        yield
    except HelpersError:
        raise
    except Exception as error:
        text = str(error)
        if "weights_only" in text or "Unsupported global" in text or "UnpicklingError" in type(error).__name__:
            message = (
                f"拒绝加载含有可执行代码的权重文件 [unsafe pickle refused]：{directory}。"
                "官方权重只含张量；请从 ModelScope 重新下载，不要使用来历不明的 .bin"
            )
        elif "size mismatch" in text or "mismatched" in text or "split" in text and "size" in text:
            message = (
                f"权重的形状与 config.json 不符 [wrong shape]：{directory}。"
                f"config.json 和权重必须来自同一个模型，请一起重新下载。原始信息：{_first_lines(text)}"
            )
        else:
            raise
        raise CheckpointError(message) from error


def refuse_missing_weights(directory, loading_info: dict) -> None:
    """Raise `CheckpointError` if transformers had to make weights up or could not use some of them."""
    for kind, meaning in (
        ("missing_keys", "缺少权重 [missing keys]"),
        ("mismatched_keys", "权重形状不符 [wrong shape]"),
        ("unexpected_keys", "有不认识的权重 [unexpected keys]"),
        ("conversion_errors", "权重无法转换 [conversion failed]"),
    ):
        keys = loading_info.get(kind)
        if keys:
            names = sorted(str(key) for key in keys)
            raise CheckpointError(
                f"{meaning}：{directory} 里共 {len(names)} 个，例如 {names[0]}。"
                f"没有用随机数代替。config.json 和权重必须来自同一个模型，{REDOWNLOAD}"
            )


def _first_lines(text: str, count: int = 3) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:count])[:500]
