"""Is this directory a complete CharacterGLM checkpoint? Cheap checks; a `CheckpointError` names file and way out."""

import json
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from .compat import load_state_dict

WEIGHT_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
OTHER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")  # may be absent
REDOWNLOAD = "请重新下载这个文件：python -m helpers download（已完整的文件不会重复下载）"
WRONG_SHAPE = "权重的形状与 config.json 不符 [wrong shape]"


def damaged(problem: str, file, way_out: str = REDOWNLOAD) -> CheckpointError:
    return CheckpointError(f"{problem}：{file}。{way_out}")


def read_json(path: Path) -> dict:
    """The JSON object in `path`; `CheckpointError` if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise damaged(f"缺少文件 {path.name} [missing file]", path) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise damaged(f"{path.name} 不是有效的 JSON [invalid JSON]（{error}）", path) from None
    if not isinstance(content, dict):
        raise damaged(f"{path.name} 的内容不是 JSON 对象 [not a JSON object]", path)
    return content


def check_checkpoint(directory: Path) -> list[Path]:
    """Check that `directory` holds the whole files of a CharacterGLM checkpoint and return its weight files.

    Reads settings, names and shapes, no weights: milliseconds on 12.5 GB. Whether the weights are those that the
    config needs, `CharacterGLMForCausalLM.from_pretrained` checks while it reads them.
    """
    if not directory.is_dir() or not any(directory.iterdir()):
        raise damaged("模型目录不存在或是空的 [empty directory]", directory, "先运行 python -m helpers download")
    if (model_type := read_json(directory / "config.json").get("model_type")) != "chatglm":
        raise CheckpointError(
            f"这不是 CharacterGLM 的模型目录 [not a CharacterGLM directory]：{directory} 的 config.json 里 "
            f"model_type={model_type!r}，应为 'chatglm'"
        )
    for name in OTHER_SETTINGS:
        if (directory / name).exists():
            read_json(directory / name)
    files = weight_files(directory)
    for file in files:
        check_weight_file(file)
        stored_tensors(file)
    return files


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a checkpoint, safetensors before `.bin`, as transformers prefers them."""
    for single, index in zip(WEIGHT_FILES, WEIGHT_INDEXES):
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            return _files_of_index(directory / index)
    needed = f"需要 {WEIGHT_INDEXES[1]} 和它列出的分片，或 model.safetensors。{REDOWNLOAD}"
    raise damaged("目录里没有权重文件 [no weight files]", directory, needed)


def _files_of_index(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(f"{index.name} 里没有 weight_map [invalid index]", index)
    for key, name in weight_map.items():
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\]+\.\w+", name):  # nothing outside the directory
            raise damaged(f"{index.name} 里 {key} 的文件名 {name!r} 无效 [invalid index]", index)
    return [index.with_name(name) for name in sorted(set(weight_map.values()))]


def check_weight_file(file: Path, way_out: str = REDOWNLOAD) -> None:
    """Raise `CheckpointError` if `file` is missing or was cut short; `way_out` ends the message."""
    if not file.is_file():
        raise damaged(f"缺少权重分片 {file.name} [missing shard]", file, way_out)
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):  # compares the header with the size of the file
                return
        # A torch checkpoint is a zip archive, whose table of contents is at the end: a cut file has none.
        zipfile.ZipFile(file).close()
    except (SafetensorError, OSError, ValueError, zipfile.BadZipFile):
        size = f"{file}，现有 {file.stat().st_size:,} 字节"
        raise damaged(f"权重文件 {file.name} 不完整或已损坏 [truncated or corrupt]", size, way_out) from None


def stored_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Name, shape and dtype of the tensors in a whole weight file, on the meta device: their data is not read."""
    try:
        # A pickle could run code when it is opened: transformers reads it with `weights_only`, which refuses instead.
        tensors = load_state_dict(file, map_location="meta")
        if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise TypeError("holds more than tensors")
        return tensors
    except Exception as error:  # whatever a damaged pickle can raise
        problem = f"拒绝加载 {file.name}：里面不只是张量，可能藏有可执行代码 [unsafe pickle refused]"
        raise damaged(problem, file, "请从 ModelScope 重新下载官方权重，不要使用来历不明的 .bin") from error


def check_loaded_weights(directory, loading_info: dict) -> None:
    """Raise `CheckpointError` if transformers had to make weights up or could not use some of them.

    Args:
        loading_info: what `from_pretrained(..., output_loading_info=True)` returns; its names are GLM's.
    """
    shapes = [f"{name} 是 {tuple(stored)}，应为 {tuple(due)}" for name, stored, due in loading_info["mismatched_keys"]]
    for problem, found in [
        ("缺少权重 [missing keys]", loading_info["missing_keys"]),
        ("有不认识的权重 [unexpected keys]", loading_info["unexpected_keys"]),
        (WRONG_SHAPE, shapes),
    ]:
        if found:
            raise unusable_weights(directory, problem, f"有 {len(found)} 处，例如 {min(found)}")


def unusable_weights(directory, problem: str, example: str) -> CheckpointError:
    way_out = f"没有用随机数代替。config.json 和权重必须来自同一个模型，{REDOWNLOAD}"
    return damaged(problem, f"{directory} 里{example}", way_out)
