"""A model with random weights: how long something takes does not depend on what the weights say."""

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from helpers.model.loading import NANO_DIR
from helpers.model.modeling import CharacterGLMConfig

SHAPE = {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 10, "num_attention_heads": 10}
SHAPES = {  # what differs from it
    "50M": {},
    "340M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 30, "num_attention_heads": 16},
}


def random_model(vocabulary: int, **shape: int):
    """A model of CharacterGLM's architecture; with the default shape it has about 50 million random weights."""
    config = CharacterGLMConfig(
        vocab_size=vocabulary,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        **SHAPE | shape,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def save_random_model(folder: Path, dtype: torch.dtype = torch.float32, **shape: int) -> Path:
    """A directory of a random model with Nano's tokenizer, which everything that reads a model directory can load."""
    vocabulary = CharacterGLMConfig.from_pretrained(NANO_DIR).vocab_size
    random_model(vocabulary, **shape).to(dtype).save_pretrained(folder)
    for file in NANO_DIR.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder
