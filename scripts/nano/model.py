"""Nano's network, and its loss on chosen positions only."""

import math

import torch
import torch.nn.functional as F

from helpers.model.modeling import CharacterGLMConfig, CharacterGLMForCausalLM

CONTEXT = 2048


def new_model(tokenizer, layers: int = 4, width: int = 256, mlp: int = 640) -> CharacterGLMForCausalLM:
    """A fresh model with tied embeddings; the file layout will keep two (equal) matrices."""
    config = CharacterGLMConfig(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
    )
    model = CharacterGLMForCausalLM(config)
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def attend(model, ids: torch.Tensor) -> torch.Tensor:
    """All of the network but its last MLP, for every position."""
    glm = model.model
    hidden = glm.embed_tokens(ids)
    rotation = glm.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    for layer in glm.layers[:-1]:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotation)
    last = glm.layers[-1]
    return hidden + last.self_attn(last.input_layernorm(hidden), rotation, attention_mask=None)[0]


def learnt_loss(model, ids: torch.Tensor, positions: torch.Tensor, attend=attend) -> torch.Tensor:
    """Mean loss of the tokens that follow `positions` (indices into the flattened batch).

    The last MLP and the vocabulary matrix, a third of the work, are computed at these positions only.
    """
    last = model.model.layers[-1]
    hidden = attend(model, ids).flatten(0, 1)[positions]
    hidden = hidden + last.mlp(last.post_attention_layernorm(hidden))
    logits = model.lm_head(model.model.norm(hidden))
    return F.cross_entropy(logits, ids.flatten()[positions + 1])
