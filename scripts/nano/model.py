"""Nano's network, and its loss on chosen positions only."""

import math

import torch
import torch.nn.functional as F

from helpers.model.modeling import CharacterGLMConfig, CharacterGLMForCausalLM

CONTEXT = 2048


def new_model(tokenizer, layers: int = 4, width: int = 256, mlp: int = 1920) -> CharacterGLMForCausalLM:
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


def take_weights(model: CharacterGLMForCausalLM, trained: CharacterGLMForCausalLM) -> None:
    """Begin where `trained` ended; an MLP that is wider now gets new neurons that say nothing yet (down_proj is 0)."""
    weights = model.state_dict()  # shares its memory with the model
    for name, old in trained.state_dict().items():
        new = weights[name]
        if name == "lm_head.weight":  # the embedding, in training
            continue
        if name.endswith("gate_up_proj.weight"):  # [gate; up]: two matrices in one
            for half, old_half in zip(new.chunk(2), old.chunk(2)):
                half[: len(old_half)] = old_half
        elif name.endswith("down_proj.weight"):
            new.zero_()[:, : old.shape[1]] = old
        else:
            new.copy_(old)


def attend(model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All of the network but its last MLP, for every position; and what half of the layers make of them."""
    glm = model.model
    hidden = glm.embed_tokens(ids)
    rotation = glm.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    for number, layer in enumerate(glm.layers[:-1], start=1):
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotation)
        if number == len(glm.layers) // 2:
            middle = hidden
    last = glm.layers[-1]
    return hidden + last.self_attn(last.input_layernorm(hidden), rotation, attention_mask=None)[0], middle


def learnt_loss(model, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss of the tokens that follow `positions` (indices into the flattened batch); and `attend`'s middle.

    The last MLP and the vocabulary matrix, a third of the work, are computed at these positions only.
    """
    last = model.model.layers[-1]
    hidden, middle = attend(model, ids)
    hidden = hidden.flatten(0, 1)[positions]
    hidden = hidden + last.mlp(last.post_attention_layernorm(hidden))
    logits = model.lm_head(model.model.norm(hidden))
    return F.cross_entropy(logits, ids.flatten()[positions + 1]), middle.flatten(0, 1)
