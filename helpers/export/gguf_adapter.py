"""A LoRA adapter as a GGUF of its own, for `llama-server --lora`: `python -m helpers export --adapter DIR --adapter-gguf FILE`.

The base stays one file, quantised or not, and each character is a small one beside it.
"""

import math
from pathlib import Path

from peft import PeftConfig, get_peft_model_state_dict

from ..errors import HelpersError
from ..model.adapters import adapter_card
from ..model.loading import load, resolve_model
from .gguf import gguf_file, gguf_name

# What PEFT can do beyond LoRA's two matrices, and llama.cpp's adapters have no place for.
WITHOUT_A_PLACE = (
    "use_dora",
    "alpha_pattern",
    "rank_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "lora_bias",
)


def export_adapter(model: str | Path, adapter: str | Path, file: str | Path) -> Path:
    """Write a LoRA adapter as one GGUF file, float32, which appears complete or not at all.

    Its persona has no place in it: a request names the character (`session_meta`), or the base speaks as its own.

    Args:
        model: the base it was trained on: "6b", "nano" or a model directory.
        adapter: a PEFT directory.
        file: must not exist yet.

    Raises:
        CheckpointError: the model is not here, or the adapter does not fit it.
        HelpersError: not a plain LoRA adapter; the file exists or cannot be written; the disk is full.
    """
    target = Path(file).expanduser()
    loaded, _ = load(resolve_model(model), device_map="cpu", adapter=adapter)
    config = loaded.peft_config["default"]
    _check_is_plain_lora(config, adapter)
    tensors = {}
    for name, tensor in get_peft_model_state_dict(loaded, save_embedding_layers=False).items():
        # base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight -> blk.3.attn_q.weight.lora_a
        layer, _, matrix = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        tensors[f"{gguf_name(f'{layer}.weight')}.{matrix.lower()}"] = tensor
    # llama.cpp scales by alpha / r; rank-stabilised LoRA by alpha / sqrt(r).
    alpha = config.lora_alpha * (math.sqrt(config.r) if config.use_rslora else 1)
    with gguf_file(target, tensors, "f32") as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(alpha))
    persona = adapter_card(adapter)
    whose = f"，角色是 {persona.bot_name}：请求里要给出它的 session_meta" if persona else ""
    print(f"导出完成 [exported]：{target}{whose}。用法：llama-server -m 底模.gguf --lora {target.name}")
    return target


def _check_is_plain_lora(config: PeftConfig, adapter) -> None:
    extras = [name for name in WITHOUT_A_PLACE if getattr(config, name, None)]
    if config.peft_type != "LORA" or extras:
        raise HelpersError(
            f"llama.cpp 只能带普通的 LoRA [not plain LoRA]：{adapter} 是 {config.peft_type.value}"
            f"{'，用了 ' + '、'.join(extras) if extras else ''}。请合并进权重：--gguf bf16 --adapter 目录"
        )
