"""One file for llama.cpp, which runs the 6B at 4 bits on a laptop: `python -m helpers export --gguf bf16 --model 6b FILE.gguf`.

llama.cpp knows the network as "chatglm" and the tokenizer as "llama" (SentencePiece BPE), but its own converter takes
neither the original folder nor an exported one. Written here are the weights under its names, the vocabulary, the prompt,
and the model's own sampling defaults. docs/laptop.md goes on from there. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import torch
from tqdm.auto import tqdm

from ..characters.personas import DEFAULT_CHARACTER, SessionMeta, get_character
from ..chat.generation import EOS_ID, GenerationParameters, model_defaults
from ..errors import HelpersError
from ..model.adapters import adapter_card
from ..model.loading import load, resolve_model
from ..model.tokenization import APPENDED_TOKENS, FIXED_IDS, NEWLINE_ID, PREFIX_TOKENS
from ..paths import new_file
from .plain import check_not_quantised, merged, plain_model
from .safetensors_copy import stored_dtype
from .template import ESCAPE, gguf_template

ARCHITECTURE = "chatglm"
# Name on the command line: (of a matrix, of the whole file). Fewer than 8 bits are llama-quantize's business.
KINDS = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
# GLM's names in transformers, and llama.cpp's. gate and up are one matrix in both, in the same order.
NAMES = {
    r"^model\.embed_tokens\.": "token_embd.",
    r"^model\.norm\.": "output_norm.",
    r"^lm_head\.": "output.",
    r"^model\.layers\.(\d+)\.": r"blk.\1.",
    r"\.self_attn\.([qkv])_proj\.": r".attn_\1.",
    r"\.self_attn\.o_proj\.": ".attn_output.",
    r"\.input_layernorm\.": ".attn_norm.",
    r"\.post_attention_layernorm\.": ".ffn_norm.",
    r"\.mlp\.gate_up_proj\.": ".ffn_up.",
    r"\.mlp\.down_proj\.": ".ffn_down.",
}


def export_gguf(model: str | Path, file: str | Path, *, kind: str = "bf16", adapter: str | Path | None = None) -> Path:
    """Write a model as one GGUF file, which appears complete or not at all.

    Memory: about one copy of the weights as they are stored, mapped rather than allocated, and the largest of them in
    float32 (1.1 GB for the 6B).

    Args:
        model: "6b", "nano" or a model directory.
        file: must not exist yet.
        kind: of the matrices: "f32", "f16", "bf16" (bit for bit what the 6B's files hold) or "q8_0". Vectors are
            float32. One whose rows are no multiple of 32 stays float16 in "q8_0".
        adapter: directory of a LoRA adapter to add to the weights. A persona beside it becomes the file's default.

    Returns:
        The file.

    Raises:
        CheckpointError: the model is not here, incomplete or not CharacterGLM; or the adapter does not fit it.
        HelpersError: the file exists or cannot be written, the disk is full, an unknown kind, a weight that the kind
            cannot hold, or the model is quantised.
    """
    if kind not in KINDS:
        raise HelpersError(
            f"不认识的 GGUF 类型 [unknown GGUF kind]：{kind!r}，可选 {'、'.join(KINDS)}；4 bit 见 docs/laptop.md"
        )
    source, target = resolve_model(model), Path(file).expanduser()
    check_not_quantised(source)
    loaded, tokenizer = load(source, dtype=stored_dtype(source), device_map="cpu", adapter=adapter)
    defaults = GenerationParameters.check(model_defaults(loaded))
    plain = plain_model(loaded if adapter is None else merged(loaded, adapter))
    persona = adapter and adapter_card(adapter) or get_character(DEFAULT_CHARACTER)
    tensors = weights(plain)
    with gguf_file(target, tensors, kind) as writer:
        add_network(writer, plain.config)
        writer.add_file_type(KINDS[kind][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_vocabulary(writer, tokenizer, plain.config.vocab_size)
        add_chat(writer, persona, defaults, plain.config.max_position_embeddings)
    print(f"导出完成 [exported]：{target}，{target.stat().st_size / 1e9:.2f} GB。用法见 docs/laptop.md")
    return target


@contextmanager
def gguf_file(target: Path, tensors: dict[str, torch.Tensor], kind: str) -> Iterator[gguf.GGUFWriter]:
    """A writer for the settings of a file; after the block they are written, and the tensors one at a time."""
    stored = {name: stored_kind(tensor, kind) for name, tensor in tensors.items()}
    sizes = {name: stored_bytes(tensor.shape, stored[name]) for name, tensor in tensors.items()}
    with new_file(target, sum(sizes.values())) as work:
        writer = gguf.GGUFWriter(work, ARCHITECTURE)
        try:
            yield writer
            for name, tensor in tensors.items():
                writer.add_tensor_info(name, tensor.shape, np.dtype("float32"), sizes[name], raw_dtype=stored[name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with tqdm(total=sum(sizes.values()), desc="GGUF", unit="B", unit_scale=True) as progress:
                for name, tensor in tensors.items():
                    writer.write_tensor_data(_stored(name, tensor, stored[name]))
                    progress.update(sizes[name])
        finally:
            writer.close()


def weights(model) -> dict[str, torch.Tensor]:
    """llama.cpp's name to tensor. Without an output layer it takes the embedding for one."""
    tied = model.config.tie_word_embeddings
    return {
        gguf_name(name): tensor
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }


def gguf_name(name: str) -> str:
    """llama.cpp's name for a weight of GLM: `model.layers.3.mlp.down_proj.weight` is `blk.3.ffn_down.weight`."""
    for pattern, replacement in NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def stored_kind(tensor: torch.Tensor, kind: str) -> gguf.GGMLQuantizationType:
    """How a tensor is stored in a file of this kind: llama.cpp wants vectors in float32, Q8_0 has blocks of 32 in a row."""
    if tensor.ndim == 1:
        return gguf.GGMLQuantizationType.F32
    chosen = KINDS[kind][0]
    fits = tensor.shape[-1] % gguf.GGML_QUANT_SIZES[chosen][0] == 0
    return chosen if fits else gguf.GGMLQuantizationType.F16


def stored_bytes(shape, kind: gguf.GGMLQuantizationType) -> int:
    """Bytes of a tensor of this shape: Q8_0 takes 34 for 32 numbers."""
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // numbers * size


def _stored(name: str, tensor: torch.Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    if kind == gguf.GGMLQuantizationType.Q8_0:
        return gguf.quants.quantize(tensor.detach().float().numpy(), kind)
    if kind == gguf.GGMLQuantizationType.BF16:
        return tensor.detach().bfloat16().contiguous().view(torch.int16).numpy()  # NumPy has no bfloat16: its bits
    numbers = tensor.detach().to(torch.float16 if kind == gguf.GGMLQuantizationType.F16 else torch.float32)
    if numbers.isinf().any():
        raise HelpersError(f"{name} 里有 float16 放不下的数 [too large for float16]。请用 --gguf bf16")
    return numbers.contiguous().numpy()


def add_network(writer: gguf.GGUFWriter, config) -> None:
    """The shape of the network, from a `GlmConfig`."""
    writer.add_type("model")
    writer.add_name("CharacterGLM")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_dimension_count(int(config.head_dim * rope["partial_rotary_factor"]))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer, size: int) -> None:
    """The vocabulary, in which no text can spell a control token.

    llama.cpp looks for the names of control tokens in all text that it is sent. So the names begin with `ESCAPE`, which
    the template writes in front of its own and takes out of what people wrote.
    """
    kinds = gguf.TokenType
    special = {"<unk>": kinds.UNKNOWN, **dict.fromkeys(("<s>", "</s>", *APPENDED_TOKENS), kinds.CONTROL)}
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    types = [special.get(name, kinds.NORMAL) for name in names]
    names = [ESCAPE + name if name in special else name for name in names]
    # Bytes are an alternative for what is no piece. A newline among them: as CONTROL it would not be written out.
    types = [kinds.BYTE if re.fullmatch("<0x[0-9A-F]{2}>", name) else kind for name, kind in zip(names, types)]
    padding = range(len(names), size)  # rows of the embedding that no token has
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*names, *(f"{ESCAPE}[PAD{i}]" for i in padding)])
    # SentencePiece merges the best score first, and has given ids in the order of scores (as `read_sentencepiece` knows).
    writer.add_token_scores([-float(i) for i in range(size)])
    writer.add_token_types([*types, *(kinds.UNUSED for _ in padding)])
    writer.add_add_space_prefix(True)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_bos_token_id(names.index(ESCAPE + PREFIX_TOKENS[0]))  # not added; 1 is <s>, which CharacterGLM never saw
    writer.add_eos_token_id(EOS_ID)
    writer.add_eot_token_id(NEWLINE_ID)  # ends a reply as well
    writer.add_unk_token_id(FIXED_IDS["<unk>"])
    writer.add_pad_token_id(FIXED_IDS["<unk>"])


def add_chat(writer: gguf.GGUFWriter, persona: SessionMeta, defaults: GenerationParameters, context: int) -> None:
    """The prompt, and how a reply is sampled when a request does not say: in transformers' order, as `helpers.chat`."""
    writer.add_chat_template(gguf_template(persona))
    writer.add_sampling_sequence("penalties;temperature;top_k;top_p")
    writer.add_sampling_temp(defaults.temperature if defaults.do_sample else 0.0)
    writer.add_sampling_top_k(defaults.top_k)
    writer.add_sampling_top_p(defaults.top_p)
    writer.add_sampling_min_p(defaults.min_p or 0.0)
    writer.add_sampling_penalty_repeat(defaults.repetition_penalty)
    writer.add_sampling_penalty_last_n(context)  # of all tokens; -1 would mean none
