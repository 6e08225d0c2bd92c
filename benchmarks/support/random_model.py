"""A model with random weights: how long something takes does not depend on what the weights say."""

import torch
from transformers import AutoModelForCausalLM

from helpers.modeling import CharacterGLMConfig


def random_model(vocabulary: int):
    """A model of CharacterGLM's architecture with about 50 million random weights."""
    config = CharacterGLMConfig(
        vocab_size=vocabulary,
        hidden_size=640,
        intermediate_size=1728,
        num_hidden_layers=10,
        num_attention_heads=10,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()
