"""A safetensors copy of a `.bin` checkpoint: `python -m helpers convert --model 6b DIR`.

Nothing needs it: `load` takes the original files, as fast. It is for tools that read safetensors only, and for handing a
model on without pickles. Names, dtype and config stay CharacterGLM's own, so that `load` takes the copy like the original.
"""

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from .checkpoint import WEIGHT_INDEXES, open_bin, read_json, weight_files
from .download import SETTINGS, require_disk_space, verify_download
from .errors import HelpersError
from .loading import resolve_model
from .modeling import verify_model
from .receipt import write_json

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
    _refuse_unusable(target, source)
    require_disk_space(target, {file.name: file.stat().st_size for file in weight_files(source)})
    try:
        _write_then_rename(source, target)
    except HelpersError:
        raise
    except KeyboardInterrupt:
        print("转换中断了 [interrupted]：没有留下半份副本")
        raise
    except (OSError, SafetensorError) as error:
        raise _explained(error, target) from error
    print(f"转换完成，每个张量都与原文件相同 [converted and compared]：{target}")
    return target


def _refuse_unusable(target: Path, source: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise HelpersError(
            f"目标已经有别的内容 [target not empty]：{target}。没有改动它，请换一个新目录，或先移走里面的文件"
        )
    if source.resolve() in target.resolve().parents:
        raise HelpersError(f"目标在模型目录里面 [target inside the model]：{target}。请换到 {source} 之外")


def _write_then_rename(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so on the same disk. A killed process leaves this directory, whose name says what it is.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.", suffix=".partial") as temporary:
        work = Path(temporary) / target.name
        work.mkdir()
        _write_weights(source, work)
        for name, content in _settings(source).items():
            (work / name).write_bytes(content)
        verify_model(work)
        if target.exists():
            target.rmdir()  # empty
        work.rename(target)


def _write_weights(source: Path, work: Path) -> None:
    plan = _plan(source)
    with tqdm(total=plan.metadata["total_size"], desc="safetensors", unit="B", unit_scale=True) as progress:
        for name, tensors in _files_to_write(source, plan):
            file = work / name
            save_file(tensors, file, metadata={"format": "pt"})
            file.chmod(0o644)  # safetensors makes it readable by its owner only
            _flush(file)
            if not _holds(file, tensors):
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


def _flush(file: Path) -> None:
    # Else a power cut after the rename could leave a file of the right size without its content.
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    return all(_holds(target / name, tensors) for name, tensors in _files_to_write(source, _plan(source)))


def _holds(file: Path, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether a safetensors file holds exactly these tensors."""
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


def _explained(error: Exception, target: Path) -> HelpersError:
    # SafetensorError carries the number of the system's error in its text only.
    if getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC})" in str(error):
        return HelpersError(
            f"磁盘写满了 [disk full]：{target} 所在的磁盘。没有留下半份副本，请清理这个磁盘，或换一个更大的磁盘上的目录"
        )
    return HelpersError(f"不能写入 [cannot write]：{target}（{error}）。请换一个可写的目录")
