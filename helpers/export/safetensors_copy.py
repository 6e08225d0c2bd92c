"""A safetensors copy of a `.bin` checkpoint: `python -m helpers convert --model 6b DIR`.

Nothing needs it: `load` takes the original files, as fast. It is for tools that read safetensors only, and for handing a
model on without pickles. The names of the weights stay CharacterGLM's own, so that `load` takes the copy like the original.
"""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import HelpersError
from ..model.checkpoint import stored_tensors, weight_files
from ..model.download import check_download
from ..model.loading import load, resolve_model
from ..model.modeling import native_state_dict
from ..paths import new_folder

SHARD_SIZE = "2GB"  # of the files written
HANDED_ON = ("tokenizer.model", "README.md", "*LICENSE*")


def convert_checkpoint(model: str | Path, directory: str | Path) -> Path:
    """Write a safetensors copy of a model into `directory`, which appears complete or not at all.

    The copy holds the weights under their original names, bit for bit and compared, the tokenizer, the settings and the
    licence; no remote code, and nothing that points to it. Memory: the weights stay in their files, mapped, except q, k
    and v, which are put together again (1.1 GB for the 6B).

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
    files = weight_files(source)
    if files[0].suffix == ".safetensors":
        print(f"已经是 safetensors，不用转换 [already safetensors]：{source}")
        return source
    loaded, tokenizer = load(source, dtype=stored_dtype(source), device_map="cpu")
    if _holds_copy(target, loaded):
        print(f"已经转换好了，每个张量都相同 [already converted]：{target}")
        return target
    with new_folder(target, {file.name: file.stat().st_size for file in files}, source) as work:
        loaded.save_pretrained(work, max_shard_size=SHARD_SIZE)
        tokenizer.save_pretrained(work)
        for file in (file for pattern in HANDED_ON for file in source.glob(pattern)):
            shutil.copy(file, work)
        check_copy(work, loaded)
    print(f"转换完成，每个张量都与原文件相同 [converted and compared]：{target}")
    return target


def _holds_copy(target: Path, model) -> bool:
    try:
        check_download(target)
        check_copy(target, model)
    except (HelpersError, SafetensorError):
        return False
    return True


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype of the largest tensor in the files: config.json of the 6B says another one."""
    tensors = [tensor for file in weight_files(directory) for tensor in stored_tensors(file).values()]
    return max(tensors, key=torch.Tensor.numel).dtype


def check_copy(directory: Path, model) -> None:
    """Read the safetensors files in `directory` and compare them with the model, bit for bit.

    Raises:
        HelpersError: a tensor is missing, differs, or is one too many.
    """
    expected, differing = model.state_dict(), None
    if model.config.tie_word_embeddings and model.lm_head.weight is model.get_input_embeddings().weight:
        expected.pop("lm_head.weight")  # written once
    for file in weight_files(directory):
        for name, tensor in native_state_dict(load_file(file), model.config).items():
            if name not in expected or not _same_bits(tensor, expected.pop(name)):
                differing = name
    if differing or expected:
        name = differing or min(expected)
        raise HelpersError(f"写出的 {name} 与模型不同 [copy differs]：{directory.parent}。请检查磁盘，再运行一次")


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    # As bytes: a NaN does not equal itself.
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)))
