"""LoRA adapters: are the files whole, were they trained on this model, and onto the model with them."""

import hashlib
from pathlib import Path

import torch

from ..characters.personas import SessionMeta, as_session_meta, read_json_object
from ..errors import CheckpointError
from .checkpoint import check_weight_file, damaged, read_json, stored_tensors

ADAPTER_RECORD = "finetune.json"  # what `helpers.finetune` writes beside an adapter: how it was trained, on what base
ORIGINAL_TARGET = "query_key_value"  # q, k and v as one layer, which the original code's adapters are for
ADAPTER_CARD = "card.json"  # the persona that an adapter speaks as, beside it


def add_adapter(model, adapter, trainable: bool = False):
    """`model` with the PEFT LoRA adapter in directory `adapter`; `CheckpointError` if it is not whole or not for it."""
    from peft import PeftModel, get_peft_model_state_dict

    stored = stored_tensors(adapter_file(Path(adapter)))
    record = Path(adapter) / ADAPTER_RECORD
    if record.is_file():  # an adapter from elsewhere has none: only its names and shapes can be checked
        trained_on, given = read_json(record).get("base"), base_fingerprint(model)
        if trained_on and given and trained_on != given:
            problem = "LoRA adapter 是在另一个底模上训练的 [adapter for another base]"
            raise damaged(problem, adapter, "请加载训练时用的那个模型，或在这个模型上重新训练")
    try:
        loaded = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        way_out = f"请用为这个模型训练的 adapter （见 notebook 04）。原始信息：{str(error)[:300]}"
        raise damaged("LoRA adapter 和这个模型对不上 [adapter does not fit]", adapter, way_out) from error
    # PEFT only warns about missing weights and leaves them at zero, that is, without effect; of others it says nothing.
    expected = get_peft_model_state_dict(loaded, save_embedding_layers=False).keys()
    for problem, names in [
        ("缺少权重 [missing adapter keys]", expected - stored.keys()),
        ("有这个模型用不上的权重 [unused adapter keys]", stored.keys() - expected),
    ]:
        if names:
            raise damaged(f"LoRA adapter {problem}，例如 {min(names)}", adapter, "请用为这个模型训练的 adapter")
    return loaded


def base_fingerprint(model) -> str | None:
    """A hash of one row of every layer's v_proj, the same in every precision; None if the weights are quantised.

    Two models of the same shape (a model and its fine-tuned copy) differ in it.
    """
    rows = []
    for name, module in model.named_modules():
        if name.endswith("self_attn.v_proj"):
            weight = getattr(module, "base_layer", module).weight  # PEFT wraps the layers it adapts
            if not weight.is_floating_point():
                return None
            # The 6B is stored in bfloat16: rounded to it, a row is the same however the model was loaded.
            rows.append(weight[0].detach().to("cpu", torch.bfloat16).view(torch.int16))
    return hashlib.sha256(torch.cat(rows).numpy().tobytes()).hexdigest()[:16]


def adapter_card(directory: str | Path) -> SessionMeta | None:
    """The persona kept beside an adapter, if there is one. Raises `CharacterError` if it is damaged."""
    file = Path(directory) / ADAPTER_CARD
    return as_session_meta(read_json_object(file)) if file.is_file() else None


def adapter_file(directory: Path) -> Path:
    """The whole weight file of a PEFT adapter; `CheckpointError` if the directory holds none for this code."""
    if is_for_original_code(adapter_config(directory)):
        raise CheckpointError(
            f"LoRA adapter 是为原版代码的 {ORIGINAL_TARGET} 训练的 [adapter for the original code]：{directory}。这里 q、k、v 是三层，"
            f"先转换一次：python -m helpers convert --adapter {directory} 新目录"
        )
    return adapter_weight_file(directory)


def is_for_original_code(config: dict) -> bool:
    return ORIGINAL_TARGET in (config.get("target_modules") or [])


def adapter_config(directory: Path) -> dict:
    """The adapter_config.json of a PEFT adapter; `CheckpointError` if there is none."""
    config = directory / "adapter_config.json"
    if not config.is_file():
        raise damaged("这不是 LoRA adapter 目录 [not an adapter directory]", directory, f"缺少 {config.name}")
    return read_json(config)


def adapter_weight_file(directory: Path) -> Path:
    """The whole weight file of a PEFT adapter of any code."""
    names = ("adapter_model.safetensors", "adapter_model.bin")  # as PEFT prefers them
    file = next((directory / name for name in names if (directory / name).is_file()), directory / names[0])
    check_weight_file(file, "请重新训练，或重新复制 adapter 目录")
    return file
