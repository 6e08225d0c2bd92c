"""LoRA adapters of the original code, for the code here: `python -m helpers convert --adapter OLD NEW`.

There one layer, query_key_value, has one A and one B, and adds B A x to the rows of q, k and v together. Here q, k and v are
layers of their own: each gets the whole A and its own rows of B, and so adds exactly the same.
"""

from pathlib import Path

from safetensors.torch import save_file
from transformers import AutoConfig

from ..errors import CheckpointError
from ..model.adapters import ORIGINAL_TARGET, adapter_config, adapter_weight_file, is_for_original_code
from ..model.checkpoint import damaged, stored_tensors
from ..model.compat import load_state_dict
from ..model.loading import resolve_model
from ..model.modeling import native_state_dict
from ..model.shapes import linear_shapes
from ..paths import new_folder, write_json

SPARE_BYTES = 1_000_000  # for the settings beside the weights
PREFIX = "base_model.model."  # PEFT's, before the name of a layer


def convert_adapter(model: str | Path, adapter: str | Path, directory: str | Path) -> Path:
    """Write the adapter in directory `adapter`, trained with the original code, as one for `helpers.load(adapter=...)`.

    Args:
        model: the base it was trained on: "6b", "nano" or a model directory. Only its config is read.
        directory: missing or empty; it appears complete or not at all.

    Raises:
        CheckpointError: not a LoRA adapter of the original code, damaged, or for a base of another shape.
        HelpersError: the directory is in use or not writable, or the disk is full. What was there is kept.
    """
    base, source, target = resolve_model(model), Path(adapter).expanduser(), Path(directory).expanduser()
    settings = adapter_config(source)
    if not is_for_original_code(settings):
        raise CheckpointError(f"不是原版代码的 adapter，不用转换 [not for the original code]：{source}，直接加载就可以")
    file = adapter_weight_file(source)
    stored_tensors(file)  # refuses a pickle that holds more than tensors
    tensors = split_adapter(load_state_dict(file, map_location="cpu"), AutoConfig.from_pretrained(base), source)
    targets = sorted({name.split(".")[-3] for name in tensors})
    with new_folder(target, {file.name: 3 * file.stat().st_size}, source, margin=SPARE_BYTES) as work:
        save_file(tensors, work / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(work / "adapter_config.json", settings | {"target_modules": targets})
    print(f"转换完成 [converted]：{target}。用法：helpers.load(..., adapter={str(target)!r})")
    return target


def split_adapter(tensors: dict, config, source: Path) -> dict:
    """The A and B of every layer under its name here. `CheckpointError` for other tensors, and for shapes of another base."""
    others = [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if others or not tensors:
        problem = f"adapter 里不只是 LoRA 的两个矩阵 [not plain LoRA]：{'、'.join(others[:3]) or '什么也没有'}"
        raise damaged(problem, source, "请用同样的数据重新训练，见 notebook 04")
    split, shapes = {}, linear_shapes(config)
    for name in (name for name in tensors if name.endswith(".lora_B.weight")):
        a, b = tensors.get(name.replace("lora_B", "lora_A")), tensors[name]
        layer = name.removeprefix(PREFIX).removesuffix(".lora_B.weight")
        if ORIGINAL_TARGET in layer and len(b) != sum(shapes[f"{part}_proj"][1] for part in "qkv"):
            raise _does_not_fit(name, b, source)
        # B has the rows of the layer's weight: it is renamed and cut as that is.
        for native, rows in native_state_dict({f"{layer}.weight": b}, config).items():
            native = native.removesuffix(".weight")
            if a is None or (a.shape[1], len(rows)) != shapes.get(native.rpartition(".")[2]):
                raise _does_not_fit(name, b, source)
            # Copies: one file cannot hold a tensor, or rows of it, twice.
            split |= {f"{PREFIX}{native}.lora_A.weight": a.clone(), f"{PREFIX}{native}.lora_B.weight": rows.clone()}
    return split


def _does_not_fit(name: str, b, source: Path) -> CheckpointError:
    way_out = "请用 --model 给出它的底模"
    return damaged(f"adapter 和底模的形状对不上 [adapter does not fit]，{name} 是 {tuple(b.shape)}", source, way_out)
