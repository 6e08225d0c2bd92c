"""The private names of transformers that this folder leans on, as read in 5.23.0; a test says when one is gone."""

from transformers import CompileConfig

NAMES = {
    "transformers:GenerationConfig._from_model_config": "transformers' defaults (temperature 1, no repetition penalty) would replace the vendor's",
    "transformers:CompileConfig._compile_all_devices": "a compiled model on a CPU would, in silence, not be compiled",
}


def has_own_generation_config(model) -> bool:
    """Whether the model's directory has a `generation_config.json`: where there is none, transformers makes one up."""
    config = getattr(model, "generation_config", None)
    return config is not None and not config._from_model_config


def compile_config(device) -> CompileConfig:
    """How `generate` compiles the decoding step on this device: on a GPU into CUDA graphs."""
    config = CompileConfig(mode="reduce-overhead" if device.type == "cuda" else "default")
    config._compile_all_devices = True  # or it would, in silence, not compile on a CPU
    return config
