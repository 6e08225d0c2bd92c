"""A plain `GlmForCausalLM` folder, for vLLM and other programs: `python -m helpers export --model 6b DIR`.

What `import helpers` teaches transformers, the folder says by itself: the network is stock transformers' GLM, the tokenizer
is a `tokenizer.json`, and the prompt is in the chat template. docs/export.md tells what is in it and how to serve it.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, normalizers
from transformers import GenerationConfig, GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast

from ..characters.personas import DEFAULT_CHARACTER, SessionMeta, get_character
from ..chat.generation import STOP_IDS, GenerationParameters, model_defaults
from ..errors import CheckpointError, HelpersError
from ..model.adapters import adapter_card
from ..model.checkpoint import read_json, weight_files
from ..model.loading import load, pick_dtype, resolve_model
from ..paths import new_folder
from .safetensors_copy import check_copy, stored_dtype
from .template import ESCAPE, ESCAPED, NOTHING, folder_template

SHARD_SIZE = "2GB"  # of the files written


def export_model(model, directory, *, adapter=None, dtype: str = "auto") -> Path:
    """Write a model as a folder that stock transformers and vLLM load, without `helpers` and without remote code.

    Memory: the weights stay in their files, mapped, except those that an adapter or `dtype` changes.

    Args:
        model: "6b", "nano" or a model directory.
        directory: missing or empty; it appears complete or not at all.
        adapter: directory of a LoRA adapter to add to the weights. A persona beside it becomes the folder's default.
        dtype: of the weights written: "float32", "float16", "bfloat16", or "auto", as they are stored. Weights that an
            adapter has changed are rounded to it.

    Raises:
        CheckpointError: the model is not here, incomplete or not CharacterGLM; or the adapter does not fit it.
        HelpersError: the directory is in use or not writable, the disk is full, an unknown dtype, or the model is
            quantised. What was there is kept.
    """
    source, target = resolve_model(model), Path(directory).expanduser()
    check_not_quantised(source)
    stored = stored_dtype(source)
    chosen = stored if dtype == "auto" else pick_dtype(dtype, "cpu", source)[0]
    sizes = {file.name: file.stat().st_size * chosen.itemsize // stored.itemsize for file in weight_files(source)}
    with new_folder(target, sizes, source) as work:
        loaded, tokenizer = load(source, dtype=chosen, device_map="cpu", adapter=adapter)
        plain = plain_model(loaded if adapter is None else merged(loaded, adapter))
        plain.save_pretrained(work, max_shard_size=SHARD_SIZE)
        check_copy(work, plain)
        persona = adapter and adapter_card(adapter) or get_character(DEFAULT_CHARACTER)
        plain_tokenizer(tokenizer, persona, plain.config.max_position_embeddings).save_pretrained(work)
        for licence in source.glob("*LICENSE*"):
            (work / licence.name).write_bytes(licence.read_bytes())
    print(f"导出完成，写出的张量都核对过 [exported and compared]：{target}")
    return target


def plain_model(model) -> GlmForCausalLM:
    """A CharacterGLM model as transformers' own GLM with the same tensors, and generation defaults that end a reply."""
    config = GlmConfig(
        **{name: getattr(model.config, name) for name in GlmConfig.__annotations__ if name != "model_type"}
    )
    # Not as its config says: transformers leaves an output layer that differs from the embedding as it is.
    config.tie_word_embeddings = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    config.eos_token_id = STOP_IDS  # also for programs that do not read generation_config.json
    with torch.device("meta"):
        plain = GlmForCausalLM(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = plain_generation_config(model)
    return plain


def plain_generation_config(model) -> GenerationConfig:
    """The model's own defaults, or the vendor's, written out: vLLM applies them to requests that do not say otherwise."""
    parameters = GenerationParameters.check(model_defaults(model))
    return parameters.to_config(parameters.max_new_tokens)


def plain_tokenizer(tokenizer, persona: SessionMeta, context: int) -> PreTrainedTokenizerFast:
    """The tokenizer without a class of its own: its chat template spells the prefix, which no other text can.

    Args:
        persona: who speaks when a request names nobody.
        context: how many tokens the model was made for.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    taken_out = [normalizers.Replace(NOTHING, ""), normalizers.Replace(ESCAPED, ESCAPE)]
    backend.normalizer = normalizers.Sequence([*backend.normalizer, *taken_out])
    plain = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=tokenizer.unk_token,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=tokenizer.model_input_names,
        model_max_length=context,
    )
    plain.chat_template = folder_template(persona)
    return plain


def check_not_quantised(source: Path) -> None:
    """Raise `HelpersError` if the directory holds bitsandbytes' weights, which no copy is made of."""
    if read_json(source / "config.json").get("quantization_config"):
        raise HelpersError(
            f"量化的模型不能导出 [quantised model]：{source}。请导出半精度的原模型，需要量化时让 vLLM 在加载时量化"
        )


def merged(loaded, adapter):
    """The model with its adapter added to the weights."""
    if not hasattr(loaded, "merge_and_unload"):
        raise HelpersError(
            f"这种 adapter 不能合并进权重 [cannot merge]：{adapter}。请换 LoRA 的 adapter（见 notebook 04）"
        )
    try:
        return loaded.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise CheckpointError(f"adapter 合并后权重里有 NaN 或无穷大 [broken adapter]：{adapter}。请重新训练") from error
