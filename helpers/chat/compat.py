"""The private names of transformers that this folder leans on, as read in 5.23.0; a test says when one is gone."""

from transformers import CompileConfig

NAMES = {
    "transformers:GenerationConfig._from_model_config": "transformers' defaults would replace the vendor's",
    "transformers:CompileConfig._compile_all_devices": "a compiled model on a CPU would, in silence, not be compiled",
}


def has_own_generation_config(model) -> bool:
    """Whether the model's directory has a `generation_config.json`.

    transformers makes one up where there is none, and only `_from_model_config` tells. Without it, its defaults
    (temperature 1, no repetition penalty) would replace the vendor's.
    """
    config = getattr(model, "generation_config", None)
    return config is not None and not config._from_model_config


def compile_config(device) -> CompileConfig:
    """How `generate` compiles the decoding step on this device: on a GPU into CUDA graphs.

    Without `_compile_all_devices` a CPU would, in silence, not compile at all.
    """
    config = CompileConfig(mode="reduce-overhead" if device.type == "cuda" else "default")
    config._compile_all_devices = True
    return config
