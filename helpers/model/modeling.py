"""The CharacterGLM network, expressed as transformers' own GLM.

CharacterGLM-6B has the ChatGLM2 architecture, and `GlmForCausalLM` is the same network under other names: rotary
embedding on half of each head, grouped-query attention, RMSNorm, a fused gate-and-up projection. So there is no
modelling code here. Three declarations are enough:

1. which field of the original `config.json` means which field of `GlmConfig` (`attribute_map`);
2. which weight of the original files is which weight of GLM (`WEIGHT_MAPPING`);
3. which settings GLM cannot honour and must therefore be refused (`REQUIRED_SETTINGS`).

Checked against the original code in `tests/unit/test_parity.py`: float32 logits within 1e-5, greedy tokens identical.
"""

import logging
import math
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, GlmConfig, GlmForCausalLM

from ..errors import UnsupportedConfigError
from .checkpoint import WRONG_SHAPE, check_checkpoint, check_loaded_weights, unusable_weights
from .compat import Split, WeightConverter, WeightRenaming, register_checkpoint_conversion_mapping

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
    **dict.fromkeys(
        ("pre_seq_len", "prefix_projection"), "这是 P-Tuning v2 的检查点；请使用原始权重，微调见 notebook 04 (LoRA)"
    ),
}


class CharacterGLMConfig(GlmConfig):
    """`GlmConfig` that reads CharacterGLM's original `config.json`. Defaults are those of CharacterGLM-6B."""

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
        check_settings(kwargs)
        kwargs.pop("auto_map", None)  # remote code has no part in this, nor in what is saved
        # The ChatGLM family stretches the rotary base for long contexts: rope_ratio 1 is the usual base of 10,000.
        kwargs.setdefault("rope_theta", 10000.0 * (kwargs.get("rope_ratio") or 1))
        super().__post_init__(**kwargs)
        if kwargs.get("multi_query_attention") is False:  # every query head has keys and values of its own
            self.num_key_value_heads = self.num_attention_heads


def check_settings(settings: dict) -> None:
    """Raise `UnsupportedConfigError` for the first setting that GLM would silently ignore or that makes no sense."""
    for name, required in REQUIRED_SETTINGS.items():
        value = settings.get(name)
        if value is not None and value != required:
            hint = UNSUPPORTED_HINTS.get(name, "请使用 CharacterGLM-6B 的原始 config.json")
            raise UnsupportedConfigError(
                f"config.json 里的 {name}={value!r} 无法支持 [unsupported setting]，只支持 {required!r}。{hint}。"
            )
    ratio = settings.get("rope_ratio", 1)
    if ratio is not None and not (type(ratio) in (int, float) and 0 < ratio < math.inf):  # True is no number here
        raise UnsupportedConfigError(f"config.json 里的 rope_ratio={ratio!r} 没有意义 [invalid rope_ratio]，应为正数")


class CharacterGLMForCausalLM(GlmForCausalLM):
    """GLM with CharacterGLM's names, which refuses to run on incomplete weights."""

    config_class = CharacterGLMConfig
    # The rotary table is recomputed in float32; the stored copy is in half precision.
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """As in transformers, but files missing or damaged, weights missing, unknown, or misshapen: `CheckpointError`.

        transformers only warns about missing weights and goes on with random numbers in their place.
        """
        path = pretrained_model_name_or_path
        if path is not None and Path(path).is_dir() and kwargs.get("state_dict") is None:
            check_checkpoint(Path(path))
        kwargs["ignore_mismatched_sizes"] = True  # they come back in `info` then, with both shapes
        with _one_clear_error(path):
            model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
            check_loaded_weights(path, info)
        keep_quantised_layout(model)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, save_original_format=True, **kwargs):
        """As in transformers, in the original layout; a quantised model in GLM's own.

        Packed weights of q, k and v, each with its scales, cannot be put together to one query_key_value again.
        """
        original = save_original_format and not getattr(self, "is_quantized", False)
        super().save_pretrained(save_directory, *args, save_original_format=original, **kwargs)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """As in torch, and takes the original names too: `Trainer` gives them back here when it resumes."""
        return super().load_state_dict(native_state_dict(state_dict, self.config), *args, **kwargs)


@contextmanager
def _one_clear_error(path):
    """Without transformers' table of the weights that it made up: they are refused, in one line."""
    log = logging.getLogger("transformers.modeling_utils")
    log.addFilter(_is_error)  # not setLevel: a level of its own makes transformers report on tensor parallelism
    try:
        yield
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        # The only conversion is the split of query_key_value, at the sizes that the config gives.
        raise unusable_weights(path, WRONG_SHAPE, "的 query_key_value 不能分成 q、k、v") from error
    finally:
        log.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def keep_quantised_layout(model) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference, which it does on CPUs with AVX512-BF16.

    Its `Linear4bit` (0.50) does so at the first forward without gradients, in place and for good: training after an
    evaluation then fails, computation is in bfloat16 whatever the dtype, and the way back rounds the scales.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


# Original name -> GLM name.
RENAMED_WEIGHTS = {
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.output_layer": "lm_head",
    "transformer.encoder.layers": "model.layers",
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}


def _qkv(suffix: str) -> WeightConverter:
    """One fused query_key_value tensor becomes q, k and v, split by rows at the sizes of the three parameters.

    In the 6B, with 32 query heads and 2 key-value heads of 128: [4608, 4096] -> [4096, 4096], [256, 4096], [256, 4096].
    """
    parts = [f"self_attn.{name}_proj.{suffix}" for name in "qkv"]
    return WeightConverter(f"self_attention.query_key_value.{suffix}", parts, operations=[Split(dim=0)])


# transformers applies it while it reads the files, and backwards in save_pretrained.
WEIGHT_MAPPING = [*(WeightRenaming(*names) for names in RENAMED_WEIGHTS.items()), _qkv("weight"), _qkv("bias")]


def native_state_dict(state_dict: dict, config: CharacterGLMConfig) -> dict:
    """`state_dict` with GLM's names, whichever of the two layouts it has: the same as `WEIGHT_MAPPING`, in memory."""
    rows = [config.head_dim * n for n in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
    native = {}
    for name, tensor in state_dict.items():
        for original, glm in RENAMED_WEIGHTS.items():
            name = name.replace(original, glm)
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
