"""LoRA on CharacterGLM: where the small matrices go, how many parameters that is, and merging them back.

A LoRA layer computes `W x + (alpha / r) B A x`: W is frozen, A has the shape (r, in) and starts random, B has the shape
(out, r) and starts at zero. So a new adapter changes nothing, and training has r (in + out) parameters instead of in * out.
"""

from pathlib import Path

from peft import LoraConfig, PeftModel, TaskType, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer

from ..errors import FinetuneError
from ..model.shapes import QKV, linear_shapes, lora_count
from ..paths import new_folder
from .arguments import LORA_DEFAULTS as DEFAULT

SPARE_BYTES = 10_000_000  # for the tokenizer and JSON files beside the weights

# The original code has one fused query_key_value; here it is three layers, each with an A and a B of its own.
LORA_TARGETS = {
    "qkv": list(QKV),
    "qv": ["q_proj", "v_proj"],
    "all-linear": "all-linear",  # every linear layer but the output layer
}


def lora_config(
    targets: str = DEFAULT["targets"],
    r: int = DEFAULT["r"],
    alpha: int = DEFAULT["alpha"],
    dropout: float = DEFAULT["dropout"],
) -> LoraConfig:
    """Raises `FinetuneError` for unknown targets and senseless values.

    Args:
        targets: a key of `LORA_TARGETS`.
        r: rank, the inner size of B A: more can be learned, and forgotten.
        alpha: B A is scaled by alpha / r, so that a change of r needs no other learning rate.
        dropout: share of the inputs of A set to zero while training.
    """
    if targets not in LORA_TARGETS:
        raise FinetuneError(f"不认识的 targets [unknown targets]：{targets!r}，可选 {'、'.join(LORA_TARGETS)}")
    if not (isinstance(r, int) and r > 0 and alpha > 0 and 0 <= dropout < 1):
        raise FinetuneError(
            f"LoRA 参数没有意义 [invalid LoRA parameter]：r={r!r}、alpha={alpha!r} 应大于 0，dropout={dropout!r} 应在 0 到 1 之间"
        )
    shape = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout}
    return LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=LORA_TARGETS[targets], bias="none", **shape)


def add_lora(model, *args, **kwargs):
    """`model` with a new LoRA adapter, the only thing that is trained. Seed torch: A starts random.

    An adapter that is there already is taken off; a model quantised with bitsandbytes is prepared for training.
    The other arguments are those of `lora_config`.
    """
    config = lora_config(*args, **kwargs)
    return get_peft_model(bare_base(model), config)


def bare_base(model):
    """The base of `model`, without adapters, and if it is quantised, prepared for training."""
    base = remove_lora(model)
    if getattr(base, "is_quantized", False):
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)  # the trainer decides that
    return base


def remove_lora(model):
    """The base of `model`, without adapters.

    PEFT would put a new adapter inside the old one's layers, and save it under names that fit no model. A base keeps
    the layers of an adapter even where the PeftModel around it is forgotten, as when a notebook cell runs twice.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            base.set_submodule(name, module.get_base_layer())
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base


def count_lora_parameters(config, targets: str = DEFAULT["targets"], r: int = DEFAULT["r"]) -> int:
    """Trainable parameters of an adapter on a model of this shape."""
    names = LORA_TARGETS[targets]
    return lora_count(config, r, list(linear_shapes(config)) if names == "all-linear" else names)


def count_fused_lora_parameters(config, r: int = 8) -> int:
    """The same for the original code's fused query_key_value: q, k and v then share one A, and B has all their rows."""
    rows = sum(linear_shapes(config)[name][1] for name in QKV)
    return config.num_hidden_layers * r * (config.hidden_size + rows)


def check_moved(model) -> None:
    """Raise `FinetuneError` if some lora_B is still zero, its starting value: training then had no effect there."""
    unmoved = [name for name, weight in model.named_parameters() if "lora_B" in name and not weight.any()]
    if unmoved:
        raise FinetuneError(
            f"LoRA 没有学到东西 [lora_B is still zero]：{len(unmoved)} 个 lora_B 还是初始值 0，例如 {unmoved[0]}。"
            "常见原因：学习率是 0、数据里没有要学的 token，或 gradient checkpointing 切断了梯度"
        )


def merge_adapter(model, tokenizer, directory: str | Path) -> Path:
    """Add the adapter to the weights of the base and save both as an ordinary model directory in the original layout.

    `model` loses its adapter: it is the merged model afterwards. `directory` must be new or empty.
    """
    if getattr(model, "is_quantized", False):
        raise FinetuneError("量化的底模不能合并 [cannot merge into a quantised base]：请以半精度重新加载底模和 adapter")
    base, size = Path(model.get_base_model().name_or_path), model.get_memory_footprint()
    with new_folder(
        Path(directory), {"model": size}, base, SPARE_BYTES
    ) as folder:  # refused before the weights are changed
        model.merge_and_unload().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Path(directory)
