"""A safetensors copy of a `.bin` checkpoint: `python -m helpers convert --model 6b DIR`.

Nothing needs it: `load` takes the original files, as fast. It is for tools that read safetensors only, and for handing a
model on without pickles. Names, dtype and config stay CharacterGLM's own, so that `load` takes the copy like the original.
"""

import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..errors import HelpersError
from ..model.checkpoint import WEIGHT_INDEXES, holds_tensors, open_bin, read_json, weight_files
from ..model.download import SETTINGS, verify_download
from ..model.loading import resolve_model
from ..model.modeling import verify_model
from ..paths import new_folder, write_json

SHARD_SIZE = "2GB"  # of the files written; in memory at a time are one of them and its original


def convert_checkpoint(model: str | Path, directory: str | Path) -> Path:
    """Write a safetensors copy of a model into `directory`, which appears complete or not at all.

    The copy holds the weights under their original names, bit for bit and compared, the tokenizer, the settings without
    `auto_map`, and the licence; no remote code. Memory: one file of `SHARD_SIZE` and its original, mapped rather than allocated.

    Args:
        model: "6b", "nano" or a model directory.
        directory: missing, empty, or the finished copy of this model, which is left as it is.

    Returns:
        The directory with the copy; that of the model itself if it has safetensors already.

    Raises:
        CheckpointError: the model is not here, incomplete or not CharacterGLM.
        HelpersError: the directory is in use or not writable, or the disk is full. What was there is kept.
    """
    source, target = resolve_model(model), Path(directory).expanduser()
    verify_download(source)
    verify_model(source)
    if weight_files(source)[0].suffix == ".safetensors":
        print(f"已经是 safetensors，不用转换 [already safetensors]：{source}")
        return source
    if _holds_copy(target, source):
        print(f"已经转换好了，每个张量都相同 [already converted]：{target}")
        return target
    with new_folder(target, {file.name: file.stat().st_size for file in weight_files(source)}, source) as work:
        _write_weights(source, work)
        for name, content in _settings(source).items():
            (work / name).write_bytes(content)
        verify_model(work)
    print(f"转换完成，每个张量都与原文件相同 [converted and compared]：{target}")
    return target


def _write_weights(source: Path, work: Path) -> None:
    plan = _plan(source)
    with tqdm(total=plan.metadata["total_size"], desc="safetensors", unit="B", unit_scale=True) as progress:
        for name, tensors in _files_to_write(source, plan):
            file = work / name
            save_file(tensors, file, metadata={"format": "pt"})
            if not holds_tensors(file, tensors):
                raise HelpersError(f"写出的 {name} 与原文件不同 [copy differs]：{work.parent}。请检查磁盘，再运行一次")
            progress.update(sum(tensor.nbytes for tensor in tensors.values()))
    if plan.is_sharded:
        write_json(work / WEIGHT_INDEXES[0], {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def _plan(source: Path):
    """Which tensors go into which file, as Hugging Face's tools lay them out and name them."""
    tensors = {name: tensor for file in weight_files(source) for name, tensor in open_bin(file, "meta").items()}
    return split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_SIZE)


def _files_to_write(source: Path, plan) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(name, tensors) of each file. The originals are mapped anew for each, so that what is done leaves the memory."""
    for name, names in plan.filename_to_tensors.items():
        stored = {
            key: tensor for file in weight_files(source) for key, tensor in open_bin(file).items() if key in names
        }
        yield name, _unshared(stored)
        del stored


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, each with memory of its own, in order: safetensors takes no others (tied embeddings share)."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if address in seen else tensor.contiguous()
        seen.add(address)
    return result


def _settings(source: Path) -> dict[str, bytes]:
    """The small files of the copy: settings, tokenizer, licence. No remote code, and nothing that points to it."""
    settings = {}
    for file in sorted(source.iterdir()):
        if file.suffix == ".json" and file.name in SETTINGS:
            content = read_json(file)
            content.pop("auto_map", None)
            settings[file.name] = (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()
        elif any(fnmatch(file.name, pattern) for pattern in SETTINGS):
            settings[file.name] = file.read_bytes()
    return settings


def _holds_copy(target: Path, source: Path) -> bool:
    """Whether `target` is the finished copy of `source`: reads and compares all of both."""
    settings = _settings(source)
    if not all((target / name).is_file() and (target / name).read_bytes() == settings[name] for name in settings):
        return False
    return all(holds_tensors(target / name, tensors) for name, tensors in _files_to_write(source, _plan(source)))
