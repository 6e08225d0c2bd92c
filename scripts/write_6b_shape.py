"""Write random weights of CharacterGLM-6B's true shape in its original two-shard layout: 12.5 GB of bfloat16.

For measuring load time, memory and speed on a GPU where the real weights are not at hand. What it says is noise. The
tokenizer is Nano's: its 4,096 ids are a part of the 65,024.

    python scripts/write_6b_shape.py models/6b-shape
    python scripts/write_6b_shape.py /tmp/small --layers 2     # 2 of the 28 blocks: 1.9 GB

The files are laid out first and then filled in place, one tensor at a time, so that memory stays far below their size.
"""

import math
import mmap
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from original_layout import INDEX, SHARDS, original_config, write_json
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import set_default_mmap_options, skip_data
from tqdm.auto import tqdm
from transformers.core_model_loading import revert_weight_conversion

from helpers.model.loading import NANO_DIR
from helpers.model.modeling import CharacterGLMConfig, CharacterGLMForCausalLM
from helpers.paths import MARGIN_BYTES, check_disk_space

FIRST_SHARD = 0.8  # of the bytes: about 10 GB of 12.5 GB, as in the original
STANDARD_DEVIATION = 0.02


def main(
    directory: Path,
    layers: Annotated[int, typer.Option(min=1, help="Blocks; the 6B has 28.")] = 28,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
) -> None:
    """Write the checkpoint into DIRECTORY."""
    write_random_checkpoint(directory, CharacterGLMConfig(num_hidden_layers=layers), seed=seed)


def write_random_checkpoint(directory: Path, config, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
    """Write config.json, two `.bin` shards, their index and Nano's tokenizer.

    Raises:
        HelpersError: the disk is too full.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards = split(original_shapes(config), dtype)
    size = sum(sum(map(math.prod, shard.values())) * dtype.itemsize for _, shard in shards)
    check_disk_space(directory, size + MARGIN_BYTES)
    torch.manual_seed(seed)
    for file, shapes in shards:
        write_shard(directory / file, shapes, dtype)
    weight_map = {name: file for file, shapes in shards for name in shapes}
    total = sum(math.prod(shape) for _, shapes in shards for shape in shapes.values()) * dtype.itemsize
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(directory / "config.json", original_config(config, dtype))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(NANO_DIR / name, directory / name)


def original_shapes(config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight in the original files, in their order: 200 for the 6B."""
    with torch.device("meta"):  # shapes only, no memory
        model = CharacterGLMForCausalLM(config)
    original = revert_weight_conversion(model, model.state_dict())
    shapes = {name: tuple(weight.shape) for name, weight in original.items()}
    first = "transformer.embedding.word_embeddings.weight"
    # Half of each head is rotated, in pairs: 32 frequencies for a head of 128.
    frequencies = {"transformer.rotary_pos_emb.inv_freq": (config.head_dim // 4,)}
    last = {"transformer.output_layer.weight": shapes.pop("transformer.output_layer.weight")}
    return {first: shapes.pop(first)} | frequencies | shapes | last


def split(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> list[tuple[str, dict]]:
    """(file, its shapes) for the two shards."""
    limit = FIRST_SHARD * sum(map(math.prod, shapes.values()))
    shards: tuple[dict, dict] = ({}, {})
    written = 0
    for name, shape in shapes.items():
        written += math.prod(shape)
        shards[written > limit][name] = shape
    return list(zip(SHARDS, shards))


def write_shard(file: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """Lay the file out with tensors that have no data, then map it into memory and fill it there."""
    with FakeTensorMode(), skip_data(materialize_fake_tensors=True):
        torch.save({name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}, file)
    with set_default_mmap_options(mmap.MAP_SHARED):  # what is written into the tensors goes into the file
        tensors = torch.load(file, mmap=True, weights_only=True)
    for name, tensor in tqdm(tensors.items(), desc=file.name):
        fill(name, tensor)


def fill(name: str, tensor: torch.Tensor) -> None:
    """Random numbers of the size that such a weight has: norms around one, the rest around zero."""
    if name.endswith("inv_freq"):
        count = tensor.numel()
        tensor.copy_(10000.0 ** -(torch.arange(count) / count))
    else:
        tensor.normal_(1.0 if "layernorm" in name else 0.0, STANDARD_DEVIATION)


if __name__ == "__main__":
    typer.run(main)
