"""The CharacterGLM network, expressed as transformers' own GLM.

CharacterGLM-6B has the ChatGLM2 architecture, and `GlmForCausalLM` is the same network under other names: rotary
embedding on half of each head, grouped-query attention, RMSNorm, a fused gate-and-up projection. So there is no
modelling code here. Three declarations are enough:

1. which field of the original `config.json` means which field of `GlmConfig` (`attribute_map`);
2. which weight of the original files is which weight of GLM (`WEIGHT_MAPPING`);
3. which settings GLM cannot honour and must therefore be refused (`REQUIRED_SETTINGS`).

Checked against the original code in `tests/unit/test_parity.py`: float32 logits within 1e-5, greedy tokens identical.
"""

import math
from copy import deepcopy
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GlmConfig, GlmForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Split,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    revert_weight_conversion,
)
from transformers.initialization import no_init_weights

from ..errors import UnsupportedConfigError
from .checkpoint import refuse_missing_weights, verify_checkpoint, verify_weights

MODEL_TYPE = "chatglm"
# Settings of the original config.json that change the computation, with the only value GLM implements.
# A field that is absent has that value.
REQUIRED_SETTINGS = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "original_rope": True,
    "hidden_dropout": 0.0,
    "pre_seq_len": None,
    "prefix_projection": False,
    "quantization_bit": 0,
    "interleaved_qkv": False,
}
UNSUPPORTED_HINTS = {
    "quantization_bit": "请换成未量化的 CharacterGLM-6B，再用 load(quantization=...) 在加载时量化",
    "pre_seq_len": "这是 P-Tuning v2 的检查点；请使用原始权重，微调见 notebook 04 (LoRA)",
    "prefix_projection": "这是 P-Tuning v2 的检查点；请使用原始权重，微调见 notebook 04 (LoRA)",
}


class CharacterGLMConfig(GlmConfig):
    """`GlmConfig` that reads CharacterGLM's original `config.json`.

    Defaults are those of CharacterGLM-6B. `rope_ratio` scales the rotary base as the ChatGLM family does
    (theta = 10000 * rope_ratio); `multi_query_attention: false` means one key-value head per query head.

    Raises:
        UnsupportedConfigError: a setting cannot be honoured (see `REQUIRED_SETTINGS`).
    """

    model_type = MODEL_TYPE
    attribute_map = {
        "num_layers": "num_hidden_layers",
        "padded_vocab_size": "vocab_size",
        "ffn_hidden_size": "intermediate_size",
        "kv_channels": "head_dim",
        "multi_query_group_num": "num_key_value_heads",
        "seq_length": "max_position_embeddings",
        "layernorm_epsilon": "rms_norm_eps",
        "add_qkv_bias": "attention_bias",
    }

    vocab_size: int = 65024
    num_hidden_layers: int = 28
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        refuse_unsupported_settings(kwargs)
        kwargs.pop("auto_map", None)  # remote code has no part in this, nor in what is saved
        kwargs.setdefault("rope_theta", 10000.0 * checked_rope_ratio(kwargs.get("rope_ratio")))
        super().__post_init__(**kwargs)
        if kwargs.get("multi_query_attention") is False:  # then multi_query_group_num, just set, means nothing
            self.num_key_value_heads = self.num_attention_heads


def refuse_unsupported_settings(settings: dict) -> None:
    """Raise `UnsupportedConfigError` for the first setting GLM would silently ignore."""
    for name, required in REQUIRED_SETTINGS.items():
        value = settings.get(name, required)
        if value is not None and value != required:
            hint = UNSUPPORTED_HINTS.get(name, "请使用 CharacterGLM-6B 的原始 config.json")
            raise UnsupportedConfigError(
                f"config.json 里的 {name}={value!r} 无法支持 [unsupported setting]，只支持 {required!r}。{hint}。"
            )


def checked_rope_ratio(ratio) -> float:
    """`rope_ratio` as a number, 1.0 if it is absent; `UnsupportedConfigError` if it is not a positive number."""
    if ratio is None:
        return 1.0
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < math.inf:
        raise UnsupportedConfigError(f"config.json 里的 rope_ratio={ratio!r} 没有意义 [invalid rope_ratio]，应为正数")
    return float(ratio)


class CharacterGLMForCausalLM(GlmForCausalLM):
    """GLM with CharacterGLM's names, which refuses to run on incomplete weights."""

    config_class = CharacterGLMConfig
    # The rotary table is recomputed in float32; the stored copy is in half precision.
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """As in transformers, but a directory is checked first and missing weights are an error.

        transformers only warns about missing weights and goes on with random numbers in their place.

        Raises:
            CheckpointError: files missing or damaged, weights missing, or of the wrong shape.
        """
        path = pretrained_model_name_or_path
        if path is not None and Path(path).is_dir() and kwargs.get("state_dict") is None:
            verify_model(Path(path), kwargs.get("config"))
        model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        refuse_missing_weights(path, info)
        keep_quantised_layout(model)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, save_original_format=True, **kwargs):
        """As in transformers, in the original layout; a quantised model in GLM's own.

        Packed weights of q, k and v, each with its scales, cannot be put together to one query_key_value: transformers
        would write files that cannot be read again.
        """
        original = save_original_format and not getattr(self, "is_quantized", False)
        super().save_pretrained(save_directory, *args, save_original_format=original, **kwargs)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """As in torch, and takes the original names too.

        `save_pretrained` writes those, and `Trainer` gives them back here when it resumes or loads the best checkpoint.
        With `strict=False`, which it uses, torch would leave every weight as it is.
        """
        return super().load_state_dict(native_state_dict(state_dict, self.config), *args, **kwargs)


def keep_quantised_layout(model) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference, which it does on CPUs with AVX512-BF16.

    Its `Linear4bit` (0.50) does so at the first forward without gradients, in place and for good: training after an
    evaluation then fails ("a view of a leaf Variable that requires grad"), computation is in bfloat16 whatever the
    dtype, and the way back rounds the scales. With this, a model computes and saves the same on every CPU.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def verify_model(directory: Path, config=None) -> None:
    """Check that `directory` holds a complete checkpoint, with exactly the weights that its config needs.

    Reads names and shapes of the weights, not their data: milliseconds on 12.5 GB.

    Raises:
        CheckpointError: files missing or damaged, weights missing, unknown, or of the wrong shape.
    """
    verify_checkpoint(directory)
    if not isinstance(config, CharacterGLMConfig):
        config = CharacterGLMConfig.from_pretrained(config or directory)
    if getattr(config, "quantization_config", None) is None:  # quantised on disk: packed weights, other shapes
        optional = [*CharacterGLMForCausalLM._keys_to_ignore_on_load_unexpected]
        if config.tie_word_embeddings:  # the output layer is the embedding, and may be stored again
            optional += [r"^transformer\.output_layer\.weight$", r"^lm_head\.weight$"]
        verify_weights(directory, *expected_shapes(config), ignored="|".join(optional))


def expected_shapes(config: CharacterGLMConfig) -> tuple[dict, dict]:
    """Names and shapes of the weights a checkpoint with this config must hold: in the original layout, and in GLM's."""
    one_block = deepcopy(config)
    one_block.num_hidden_layers = 1
    with torch.device("meta"), no_init_weights():  # shapes only: no memory, no random numbers
        model = CharacterGLMForCausalLM(one_block)
    native = model.state_dict()
    if config.tie_word_embeddings:
        native.pop("lm_head.weight")
    original = revert_weight_conversion(model, native)
    return tuple(_repeat_block(layout, config.num_hidden_layers) for layout in (original, native))


def _repeat_block(tensors: dict[str, torch.Tensor], blocks: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a model with `blocks` blocks, which are all alike, from the tensors of a model with one."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    first = {name: shapes.pop(name) for name in tensors if ".layers.0." in name}
    return shapes | {
        name.replace(".layers.0.", f".layers.{number}."): shape
        for number in range(blocks)
        for name, shape in first.items()
    }


def _qkv(suffix: str) -> WeightConverter:
    """One fused query_key_value tensor becomes q, k and v, split by rows at the sizes of the three parameters."""
    parts = [f"self_attn.{name}_proj.{suffix}" for name in "qkv"]
    return WeightConverter(f"self_attention.query_key_value.{suffix}", parts, operations=[Split(dim=0)])


# Original name -> GLM name. transformers applies it while it reads the files, and backwards in save_pretrained.
WEIGHT_MAPPING = [
    WeightRenaming("transformer.embedding.word_embeddings", "model.embed_tokens"),
    WeightRenaming("transformer.encoder.final_layernorm", "model.norm"),
    WeightRenaming("transformer.output_layer", "lm_head"),
    WeightRenaming("transformer.encoder.layers", "model.layers"),
    WeightRenaming("self_attention.dense", "self_attn.o_proj"),
    WeightRenaming("mlp.dense_h_to_4h", "mlp.gate_up_proj"),
    WeightRenaming("mlp.dense_4h_to_h", "mlp.down_proj"),
    _qkv("weight"),
    _qkv("bias"),
]


def native_state_dict(state_dict: dict, config: CharacterGLMConfig) -> dict:
    """`state_dict` with GLM's names, whichever of the two layouts it has."""
    renamings = [mapping for mapping in WEIGHT_MAPPING if isinstance(mapping, WeightRenaming)]
    rows = [config.head_dim * n for n in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
    native = {}
    for name, tensor in state_dict.items():
        name = apply_renamings(name, renamings)
        if ".query_key_value." in name:
            layer, suffix = name.split(".self_attention.query_key_value.")
            native |= {f"{layer}.self_attn.{p}_proj.{suffix}": part for p, part in zip("qkv", tensor.split(rows))}
        elif not name.endswith("rotary_pos_emb.inv_freq"):
            native[name] = tensor
    return native


def register() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` know the family. Safe to call twice."""
    AutoConfig.register(MODEL_TYPE, CharacterGLMConfig, exist_ok=True)
    AutoModelForCausalLM.register(CharacterGLMConfig, CharacterGLMForCausalLM, exist_ok=True)
    register_checkpoint_conversion_mapping(MODEL_TYPE, WEIGHT_MAPPING, overwrite=True)
