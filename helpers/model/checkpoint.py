"""Is this directory a complete CharacterGLM checkpoint? Cheap checks on the files, and clear errors when one fails."""

import json
import re
import struct
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError

WEIGHT_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
OTHER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")  # may be absent
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
        raise CheckpointError(
            f"找不到模型目录 [model directory not found]：{directory}。先运行 python -m helpers download"
        )
    if not any(directory.iterdir()):
        raise CheckpointError(f"模型目录是空的 [empty directory]：{directory}。先运行 python -m helpers download")
    config = read_json(directory / "config.json")
    if config.get("model_type") != "chatglm":
        raise CheckpointError(
            f"这不是 CharacterGLM 的模型目录 [not a CharacterGLM directory]：{directory} 的 config.json 里 "
            f"model_type={config.get('model_type')!r}，应为 'chatglm'"
        )
    for name in OTHER_SETTINGS:
        if (directory / name).exists():
            read_json(directory / name)
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
            return _files_of_index(directory / index)
    raise CheckpointError(
        f"目录里没有权重文件 [no weight files]：{directory}，"
        f"需要 {WEIGHT_INDEXES[1]} 和它列出的分片，或 model.safetensors。{REDOWNLOAD}"
    )


def _files_of_index(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index.name} 里没有 weight_map [invalid index]：{index}。{REDOWNLOAD}")
    for key, name in weight_map.items():
        # A plain file name: an index must not reach outside its directory.
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
            raise CheckpointError(
                f"{index.name} 里 {key} 的文件名 {name!r} 无效 [invalid index]：{index}。{REDOWNLOAD}"
            )
    return [index.with_name(name) for name in sorted(set(weight_map.values()))]


def verify_weight_file(file: Path, way_out: str = REDOWNLOAD) -> None:
    """Raise `CheckpointError` if `file` is missing or was cut short; `way_out` ends the message."""
    if not file.is_file():
        raise CheckpointError(f"缺少权重分片 {file.name} [missing shard]：{file}。{way_out}")
    intact = _safetensors_intact(file) if file.suffix == ".safetensors" else _torch_archive_intact(file)
    if not intact:
        raise CheckpointError(
            f"权重文件 {file.name} 不完整或已损坏 [truncated or corrupt]：{file}，"
            f"现有 {file.stat().st_size:,} 字节。{way_out}"
        )


def _torch_archive_intact(file: Path) -> bool:
    # A torch checkpoint is a zip archive, whose table of contents is at the end: a cut file has none.
    return zipfile.is_zipfile(file)


def _safetensors_intact(file: Path) -> bool:
    try:
        header, start = _safetensors_header(file)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, struct.error):
        return False
    return file.stat().st_size == start + end


def _safetensors_header(file: Path) -> tuple[dict[str, dict], int]:
    # 8 bytes of header length, the header (JSON), then the data, to which the offsets in the header refer.
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if 8 + length > file.stat().st_size:
            raise ValueError("header longer than the file")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in an intact weight file. Their data is not read: milliseconds on 10 GB.

    Raises:
        CheckpointError: a `.bin` holds anything but named tensors (see `open_bin`).
    """
    if file.suffix == ".safetensors":
        return {name: tuple(entry["shape"]) for name, entry in _safetensors_header(file)[0].items()}
    return {name: tuple(tensor.shape) for name, tensor in open_bin(file, "meta").items()}


def open_bin(file: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The tensors of a `.bin`. They stay in the file, mapped into memory, until their numbers are used.

    Args:
        device: "meta" for tensors with shape and dtype and no data.

    Raises:
        CheckpointError: it holds anything but named tensors. Such a pickle could run code when it is opened; it is read
            with `weights_only`, which refuses instead.
    """
    try:
        tensors = torch.load(file, map_location=device, weights_only=True, mmap=True)
        if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise TypeError("holds more than tensors")
        return tensors
    except Exception as error:
        raise CheckpointError(
            f"拒绝加载 {file.name}：里面不只是张量，可能藏有可执行代码 [unsafe pickle refused]：{file}。"
            "请从 ModelScope 重新下载官方权重，不要使用来历不明的 .bin"
        ) from error


def holds_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether a safetensors file holds exactly these tensors, bit for bit."""
    try:
        with safe_open(file, "pt") as stored:
            same_names = set(stored.keys()) == tensors.keys()
            return same_names and all(_same_bits(stored.get_tensor(name), tensors[name]) for name in tensors)
    except (OSError, SafetensorError):
        return False


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    # As bytes: a NaN does not equal itself.
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def verify_weights(directory: Path, *layouts: dict[str, tuple[int, ...]], ignored: str | None = None) -> None:
    """Check that a checkpoint holds exactly the weights of one of `layouts` (name to shape).

    transformers would only warn about missing weights and go on with random numbers in their place.

    Args:
        ignored: a regular expression for names that may be there without being in the layout.

    Raises:
        CheckpointError: naming weight and file.
    """
    shapes, home = {}, {}
    for file in weight_files(directory):
        found = stored_shapes(file)
        shapes.update(found)
        home.update(dict.fromkeys(found, file.name))
    expected = max(layouts, key=lambda layout: len(layout.keys() & shapes.keys()))
    unknown = [name for name in shapes if name not in expected and not (ignored and re.search(ignored, name))]
    wrong = [name for name in expected if name in shapes and shapes[name] != tuple(expected[name])]
    _refuse_weights(directory, "缺少权重 [missing keys]", [name for name in expected if name not in shapes])
    _refuse_weights(directory, "有不认识的权重 [unexpected keys]", [f"{home[name]} 里的 {name}" for name in unknown])
    _refuse_weights(
        directory,
        "权重的形状与 config.json 不符 [wrong shape]",
        [f"{home[name]} 里的 {name} 是 {shapes[name]}，应为 {tuple(expected[name])}" for name in wrong],
    )


def _refuse_weights(directory, problem: str, examples: list[str]) -> None:
    if examples:
        raise CheckpointError(
            f"{problem}：{directory} 里有 {len(examples)} 处，例如 {examples[0]}。"
            f"没有用随机数代替。config.json 和权重必须来自同一个模型，{REDOWNLOAD}"
        )


def refuse_missing_weights(directory, loading_info: dict) -> None:
    """Raise `CheckpointError` if transformers had to make weights up or could not use some of them."""
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys", "conversion_errors"):
        names = sorted(map(str, loading_info.get(kind) or ()))
        _refuse_weights(directory, f"权重与模型对不上 [{kind.replace('_', ' ')}]", names)
