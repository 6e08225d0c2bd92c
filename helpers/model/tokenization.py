"""CharacterGLM's tokenizer as a fast tokenizer, built from the original `tokenizer.model`.

SentencePiece BPE with byte fallback, reproduced with the `tokenizers` library; equal to SentencePiece on every string
(`tests/unit/test_tokenization.py`). What a user types is always text: strings that look like control tokens
(`</s>`, `[gMASK]`, `<0x0A>`) are spelled out in ordinary pieces.
"""

import json
import re
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, TokenizersBackend

from ..characters.personas import as_session_meta
from .checkpoint import damaged
from .compat import generate_merges
from .modeling import CharacterGLMConfig

# Control tokens that follow the SentencePiece pieces, in this order (64789 ... 64793 in CharacterGLM-6B).
APPENDED_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
PREFIX_TOKENS = ("[gMASK]", "<sop>")
NEWLINE_ID = 13  # <0x0A>: ends a reply
FIXED_IDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": NEWLINE_ID}  # what every tokenizer of the family agrees on
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


class ChatGLMTokenizer(TokenizersBackend):
    """The tokenizer of CharacterGLM. The name is the one that the original `tokenizer_config.json` asks for.

    `tokenizer(text)` gives `[gMASK] <sop>` and the ids of `text`; padding is on the left with id 0;
    `apply_chat_template(messages, session_meta=...)` gives the exact prompt ids, prefix included. With the 6B:

        tokenizer("你好")["input_ids"]  ->  [64790, 64792, 36474, 54591]
                                            [gMASK] <sop>  ▁你    好
    """

    vocab_files_names = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}
    padding_side = "left"
    model_input_names = ["input_ids", "attention_mask"]
    model = BPE

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers; `CheckpointError` if `tokenizer.model` is missing or damaged, or `tokenizer.json` is."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except json.JSONDecodeError as error:
            file = Path(pretrained_model_name_or_path) / "tokenizer.json"
            raise damaged(f"tokenizer.json 不是有效的 JSON [invalid JSON]（{error}）", file) from None

    @classmethod
    def convert_to_native_format(cls, **kwargs):
        """Vocabulary and merges from `tokenizer.model`, or from `tokenizer.json` after `save_pretrained`."""
        file = kwargs.get("vocab_file") or kwargs.get("tokenizer_file")
        if file is None or not Path(file).is_file():
            raise damaged("缺少文件 tokenizer.model [missing file]", kwargs.get("name_or_path", ""))
        if kwargs.get("vocab_file"):
            kwargs["vocab"], kwargs["merges"] = read_sentencepiece(file)
            kwargs.pop("tokenizer_file", None)
        else:
            kwargs = super().convert_to_native_format(**kwargs)
        vocab = kwargs.get("vocab") or {}
        if any(vocab.get(piece) != i for piece, i in FIXED_IDS.items()):
            raise damaged("这不是 CharacterGLM 的词表 [not CharacterGLM's tokenizer]", file)
        return kwargs

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], **kwargs):
        self._tokenizer = build_backend(vocab, merges)
        self._bytes: dict[int, bytes] = {}  # of the ids decoded so far
        # Old settings files spell these differently; the family has one fixed set.
        for name in ("unk_token", "bos_token", "eos_token", "pad_token", "additional_special_tokens", "auto_map"):
            kwargs.pop(name, None)
        appended = [AddedToken(token, normalized=False, special=True) for token in APPENDED_TOKENS]
        kwargs["extra_special_tokens"] = appended
        kwargs["split_special_tokens"] = True  # text never becomes a control token
        kwargs.setdefault("chat_template", CHAT_TEMPLATE)
        super().__init__(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>", **kwargs)
        self.prefix_ids = self.convert_tokens_to_ids(list(PREFIX_TOKENS))
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{' '.join(PREFIX_TOKENS)} $A",
            pair=f"{' '.join(PREFIX_TOKENS)} $A $B",
            special_tokens=list(zip(PREFIX_TOKENS, self.prefix_ids)),
        )

    def __call__(self, *args, chat_prefix=False, **kwargs):
        """As in transformers; `chat_prefix` overrules `add_special_tokens=False`, see `apply_chat_template`."""
        if chat_prefix:
            kwargs["add_special_tokens"] = True
        return super().__call__(*args, **kwargs)

    def convert_tokens_to_string(self, tokens):
        r"""The text of a list of tokens; bytes that are no character become U+FFFD.

        While an emoji of four byte tokens is streamed, its last bytes are still to come for a moment. The decoder of
        `tokenizers` would then give up every character of the run; SentencePiece, and so this, only the unfinished one:

            ["▁", "<0xF0>", "<0x9F>"]  ->  b" \xf0\x9f"  ->  " \ufffd"  ->  "\ufffd"
        """
        # 1. All bytes in a row, 2. decoded at once, 3. without the space that SentencePiece puts before every text.
        data = b"".join(piece_bytes(token) for token in tokens if token is not None)
        text = data.decode("utf-8", errors="replace")
        return text.removeprefix(" ") if tokens and tokens[0] and tokens[0].startswith("▁") else text

    def _decode(self, token_ids, skip_special_tokens=False, **kwargs):
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        if skip_special_tokens:
            special = set(self.all_special_ids)
            ids = [token for token in ids if token not in special]
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
        begins_with_space = ids and (self._tokenizer.id_to_token(ids[0]) or "").startswith("▁")
        return text.removeprefix(" ") if begins_with_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token stands for; none if the id only pads the model's vocabulary."""
        found = self._bytes.get(token_id)
        if found is None:
            piece = self._tokenizer.id_to_token(token_id)
            if piece is None:
                return b""
            found = self._bytes[token_id] = piece_bytes(piece)
        return found

    def apply_chat_template(self, conversation, *args, session_meta=None, tokenizer_kwargs=None, **kwargs):
        """As in transformers, with `session_meta=` (a dict or a `SessionMeta`) and the `[gMASK] <sop>` prefix.

        transformers tokenizes a rendered chat without special tokens, because its templates spell them out. Ours must
        not: the text of a user could then spell them too. So the prefix is asked of the tokenizer instead, and
        `sanitize_control_tokens` has nothing left to do.
        """
        kwargs.pop("sanitize_control_tokens", None)
        kwargs["tokenizer_kwargs"] = {"chat_prefix": True, **(tokenizer_kwargs or {})}
        meta = as_session_meta(session_meta).model_dump()
        return super().apply_chat_template(conversation, *args, session_meta=meta, **kwargs)


def read_sentencepiece(file) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary (piece to id) and BPE merges, best first, of a SentencePiece model file.

    Control, byte and unknown pieces are in the vocabulary but never the product of a merge: SentencePiece does not
    produce them from text that spells their names.
    """
    try:
        pieces = SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise damaged("tokenizer.model 已损坏 [invalid tokenizer.model]", file) from error
    ids = list(range(len(pieces)))  # in one call each: one by one, 64,789 pieces take a tenth of a second
    names = pieces.id_to_piece(ids)
    vocab = dict(zip(names, ids))
    not_text = set()
    for is_kind in (pieces.is_control, pieces.is_byte, pieces.is_unknown, pieces.is_unused):
        not_text |= {name for name, found in zip(names, is_kind(ids)) if found}
    return vocab, generate_merges(vocab, skip_tokens=not_text)


def build_backend(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """A `tokenizers.Tokenizer` that does what SentencePiece does: a leading space, spaces as "▁", bytes as fallback."""
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def piece_bytes(piece: str) -> bytes:
    """The UTF-8 bytes that a piece of the vocabulary stands for: "<0x0A>" one, "▁你" a space and three."""
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes.fromhex(piece[3:5])
    return piece.replace("▁", " ").encode()


def register() -> None:
    """Make `AutoTokenizer` know the family. Safe to call twice."""
    AutoTokenizer.register(CharacterGLMConfig, tokenizer_class=ChatGLMTokenizer, exist_ok=True)
