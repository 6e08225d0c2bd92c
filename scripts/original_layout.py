"""Write a model in CharacterGLM's original layout: two `.bin` shards with an index, original names and config fields."""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

INDEX = "pytorch_model.bin.index.json"
SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


def original_state_dict(model, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights under their original names, `query_key_value` fused, as `save_pretrained` writes them."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        weights = {}
        for file in sorted(Path(directory).glob("*.safetensors")):
            weights.update(load_file(file))
    inverse_frequencies = model.model.rotary_emb.inv_freq.clone()
    weights["transformer.rotary_pos_emb.inv_freq"] = inverse_frequencies
    return {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}


def original_config(config, dtype: torch.dtype) -> dict:
    """`config.json` with the original field names."""
    return {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "kv_channels": config.head_dim,
        "multi_query_attention": True,
        "multi_query_group_num": config.num_key_value_heads,
        "padded_vocab_size": config.vocab_size,
        "seq_length": config.max_position_embeddings,
        "layernorm_epsilon": config.rms_norm_eps,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "rmsnorm": True,
        "post_layer_norm": True,
        "original_rope": True,
        "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def write_original_layout(model, directory: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write config.json, the two shards (of about equal size) and their index."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = original_state_dict(model, dtype)
    half = sum(tensor.nbytes for tensor in weights.values()) / 2
    shards: tuple[dict, dict] = ({}, {})
    written = 0
    for name, tensor in weights.items():
        shards[written >= half][name] = tensor
        written += tensor.nbytes
    for file, shard in zip(SHARDS, shards):
        torch.save(shard, directory / file)
    weight_map = {name: file for file, shard in zip(SHARDS, shards) for name in shard}
    write_json(directory / INDEX, {"metadata": {"total_size": written}, "weight_map": weight_map})
    write_json(directory / "config.json", original_config(model.config, dtype))


def write_json(file: Path, content: dict) -> None:
    """Write `content` in the layout of the original files."""
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
