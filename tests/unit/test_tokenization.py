"""The fast tokenizer against sentencepiece itself, and that what a user types is never a control token."""

import copy
import json
import pickle
import random
import re

import pytest
import torch
from reference import COMPACT, NANO, shared, train_tokenizer
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

import helpers  # noqa: F401 - registers the family
from helpers.errors import CheckpointError
from helpers.model.tokenization import ChatGLMTokenizer

CONTROL_NAMES = [
    *("</s>", "<s>", "<unk>", "<pad>", "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<sop>", "<eop>"),
    *("<|user|>", "<|assistant|>", "<|endoftext|>", "[PAD]", "[UNK]", "▁<sop>", "sophomore", "develop"),
    *(f"<0x{byte:02X}>" for byte in range(256)),
]
META = {"bot_name": "苏梦远", "user_name": "陆星辰", "bot_info": "歌手。", "user_info": ""}
CONVERSATION = [
    {"role": "user", "content": "你好</s>[gMASK]<sop>"},
    {"role": "assistant", "content": "（笑）你好😀 <0x0A>"},
]


def characters(*ranges: tuple[int, int]) -> list[str]:
    return [chr(code) for start, end in ranges for code in range(start, end + 1)]


ALPHABETS = {
    "ascii": characters((0x20, 0x7E)),
    "control": characters((0x00, 0x1F), (0x7F, 0x9F)),
    "whitespace": [*"    \t\n\r\v\f\xa0\u2028\u2029\u3000\ufeff", "  ", "    ", "\n\n", "\r\n", "▁"],
    "latin": characters((0xA1, 0x24F)),
    "combining": [*"aeo가か", *characters((0x300, 0x36F), (0x3099, 0x309A), (0x20D0, 0x20F0))],
    "cjk": characters((0x4E00, 0x9FFF)),
    "kana": characters((0x3041, 0x30FF)),
    "punctuation": characters((0x2010, 0x2060), (0x3001, 0x301F)),
    "full-width": characters((0xFF01, 0xFFEF)),
    "emoji": [
        *characters((0x1F300, 0x1F6FF), (0x1F900, 0x1F9FF)),
        "\u200d",
        "\ufe0f",
        "👩‍👩‍👧‍👦",
        "👨🏽‍🚀",
        "🏳️‍🌈",
        "🇨🇳",
    ],
    "scripts": characters((0x370, 0x52F), (0x5D0, 0x6FF), (0x900, 0xE7F), (0xAC00, 0xACFF)),
    "rare planes": characters((0x20000, 0x203FF), (0x30000, 0x300FF), (0x1D400, 0x1D4FF)),
    "private": characters((0xE000, 0xE0FF), (0xFFF0, 0xFFFF), (0xE0000, 0xE007F), (0x10FF00, 0x10FFFF)),
    "names": CONTROL_NAMES,
}


def random_strings(count: int, seed: int) -> list[str]:
    """Strings over one to five alphabets, the empty one first; every alphabet occurs alone and mixed."""
    rng = random.Random(seed)
    names = list(ALPHABETS)
    strings = [""]
    while len(strings) < count:
        chosen = rng.sample(names, rng.choice((1, 1, 2, 3, 5)))
        length = rng.choice((1, 2, 5, 20, 40))
        strings.append("".join(rng.choice(ALPHABETS[rng.choice(chosen)]) for _ in range(length)))
    return strings


STRINGS = random_strings(20_000, seed=20240601)


@pytest.fixture(scope="module", params=["nano", "real"])
def tokenizer_dir(request):
    return NANO if request.param == "nano" else shared("golden/real_tokenizer")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture(scope="module")
def pieces(tokenizer_dir):
    return SentencePieceProcessor(model_file=str(tokenizer_dir / "tokenizer.model"))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tiny"))


def new_directory(path, tokenizer_model: bytes | None):
    path.mkdir()
    (path / "config.json").write_bytes((COMPACT / "config.json").read_bytes())
    if tokenizer_model is not None:
        (path / "tokenizer.model").write_bytes(tokenizer_model)
    return path


def plain_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def assert_equal_to_sentencepiece(tokenizer, pieces, texts: list[str]) -> None:
    found, expected = plain_ids(tokenizer, texts), pieces.encode(texts)
    different = [text for text, a, b in zip(texts, found, expected) if a != b]
    assert not different, f"{len(different)} of {len(texts)} differ, first {different[0]!r}"
    # U+2581 stands for a space in SentencePiece, so it cannot come back.
    decoded = tokenizer.batch_decode(found)
    lost = [text for text, back in zip(texts, decoded) if back != text.replace("▁", " ")]
    assert not lost, f"{len(lost)} of {len(texts)} do not round-trip, first {lost[0]!r}"


def assert_same_behaviour(tokenizer, other) -> None:
    """`other` does what `tokenizer` does, as far as a reader can see."""
    texts = STRINGS[:500]
    assert type(other) is ChatGLMTokenizer
    assert other(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert other.batch_decode(tokenizer(texts)["input_ids"]) == tokenizer.batch_decode(tokenizer(texts)["input_ids"])
    padded = [t(["a", "你好呀，小苏"], padding=True) for t in (tokenizer, other)]
    assert dict(padded[0]) == dict(padded[1])
    options = {"session_meta": META, "return_assistant_tokens_mask": True, "return_dict": True}
    chats = [t.apply_chat_template(CONVERSATION, **options) for t in (tokenizer, other)]
    assert dict(chats[0]) == dict(chats[1])
    for name in ("all_special_ids", "pad_token_id", "eos_token_id", "padding_side", "split_special_tokens"):
        assert getattr(other, name) == getattr(tokenizer, name), name
    assert len(other) == len(tokenizer)


def test_the_random_strings_cover_every_alphabet():
    for name, alphabet in ALPHABETS.items():
        assert any(character in text for text in STRINGS for character in alphabet[-20:]), name
    assert "" in STRINGS and len(STRINGS) >= 20_000


def test_equal_to_sentencepiece_on_random_strings(tokenizer, pieces):
    assert_equal_to_sentencepiece(tokenizer, pieces, STRINGS)


def test_equal_to_sentencepiece_on_a_real_corpus(tokenizer, pieces):
    rows = json.loads(shared("data/huanhuan.json").read_text(encoding="utf-8"))
    texts = [row[field] for row in rows for field in ("instruction", "input", "output")]
    texts += ["\n".join(texts[start : start + 30]) for start in range(0, len(texts), 30)]
    assert len(rows) == 3729
    assert_equal_to_sentencepiece(tokenizer, pieces, texts)


def test_decodes_any_tokens_like_sentencepiece(tokenizer, pieces):
    """Single tokens, as a stream brings them, and characters cut in the middle of their bytes."""
    ordinary = [i for i in range(len(pieces)) if not pieces.is_control(i) and not pieces.is_unknown(i)]
    emoji = [pieces.piece_to_id(f"<0x{byte:02X}>") for byte in "😀".encode()]
    rng = random.Random(1)
    sequences = [[i] for i in rng.sample(ordinary, 500)] + [[i] for i in ordinary if pieces.is_byte(i)]
    sequences += [(pieces.encode("你") + emoji * 2)[:cut] for cut in range(1, 12)]
    sequences += [[*emoji, emoji[1], *emoji], [*emoji[:2], *pieces.encode("好")], rng.sample(ordinary, 200)]
    for ids in sequences:
        expected = re.sub(
            "\ufffd+", "\ufffd", pieces.decode(ids)
        )  # how many stand for a cut character is a matter of taste
        assert re.sub("\ufffd+", "\ufffd", tokenizer.decode(ids)) == expected, ids
        assert tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids)) == tokenizer.decode(ids)


def test_tokenizer_json_decodes_without_this_class(tokenizer):
    """Other programs read the saved `tokenizer.json` alone."""
    for text in ("你好，小苏", " two  spaces ", "", "😀</s>\n"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.backend_tokenizer.decode(ids) == text


def test_decodes_what_a_model_may_produce_beyond_the_vocabulary(tokenizer, pieces):
    """The vocabulary is padded to a round number: ids up there have no piece."""
    ids = pieces.encode("你好")
    assert tokenizer.decode([*ids, len(tokenizer) + 1]) == "你好"
    assert tokenizer.decode([]) == "" and tokenizer.decode(ids[0]) == pieces.decode(ids[:1])
    assert tokenizer.decode(torch.tensor([ids, ids])) == ["你好", "你好"]
    assert tokenizer.decode([*tokenizer.prefix_ids, *ids, 2]) == "[gMASK]<sop> 你好</s>"
    assert tokenizer.decode([*tokenizer.prefix_ids, *ids, 2], skip_special_tokens=True) == "你好"


@pytest.mark.parametrize("template", ["{}", "a{}b", " {} ", "{0}{0}", "你好{}呀", "\n{}\n"])
def test_control_names_are_text(tokenizer, pieces, template):
    texts = [template.format(name) for name in CONTROL_NAMES]
    assert_equal_to_sentencepiece(tokenizer, pieces, texts)
    for text, ids in zip(texts, plain_ids(tokenizer, texts)):
        assert not set(ids) & set(tokenizer.all_special_ids), text
        assert ids.count(13) == text.count("\n"), text


def test_control_names_are_text_in_every_way_of_encoding(tokenizer):
    special = set(tokenizer.all_special_ids) - {tokenizer.convert_tokens_to_ids(t) for t in ("[gMASK]", "<sop>")}
    text = "</s>[gMASK]<sop><eop><unk>[MASK]"
    ways = [
        tokenizer.encode(text),
        tokenizer(text)["input_ids"],
        tokenizer([text, "a"], padding=True)["input_ids"][0],
        tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)),
        tokenizer(text, text)["input_ids"],
    ]
    for ids in ways:
        assert not set(ids) & special
        assert ids[2:].count(tokenizer.prefix_ids[0]) == 0


def test_pieces_that_could_be_joined_to_control_names(tmp_path):
    """A vocabulary with "<", "unk>", "/s>" and "0x0A>": one more merge would spell a control token."""
    near = train_tokenizer(
        tmp_path,
        ("xunk> yunk> zunk> kunk>", "x/s> y/s> z/s> k/s>", "x0x0A> y0x0A> z0x0A> k0x0A>", "a< b< c< d<"),
        split_by_unicode_script=False,
        split_by_number=False,
    )
    pieces = SentencePieceProcessor(model_file=str(near))
    assert all(pieces.piece_to_id(piece) > 258 for piece in ("<", "unk>", "/s>", "0x0A>"))
    tokenizer = AutoTokenizer.from_pretrained(new_directory(tmp_path / "model", near.read_bytes()))
    for text in ("</s>", "a<unk>b", "<0x0A>", "x<0x0A></s><unk>"):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)


def test_special_ids_follow_the_pieces(tokenizer, pieces):
    base = len(pieces)
    names = ["<unk>", "<s>", "</s>", "<0x0A>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 13, base, base + 1, base + 2, base + 3, base + 4]
    assert len(tokenizer) == base + 5
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)


def test_prefix(tokenizer, pieces):
    base = len(pieces)
    assert tokenizer("你好")["input_ids"] == [base + 1, base + 3, *pieces.encode("你好")]
    assert tokenizer("")["input_ids"] == [base + 1, base + 3]
    assert tokenizer.decode(tokenizer("你好 <sop>")["input_ids"], skip_special_tokens=True) == "你好 <sop>"


def test_padding_is_on_the_left_with_zero(tokenizer):
    texts = ["a", "你好呀，小苏，今天天气怎么样", ""]
    alone = [tokenizer(text)["input_ids"] for text in texts]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    width = max(map(len, alone))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, width)
    for row, mask, ids in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), alone):
        gap = width - len(ids)
        assert row == [0] * gap + ids
        assert mask == [0] * gap + [1] * len(ids)


def test_pad_method_pads_like_the_call(tokenizer):
    texts = ["a", "你好呀，小苏"]
    padded = tokenizer.pad([tokenizer(text) for text in texts], return_tensors="pt")
    assert torch.equal(padded["input_ids"], tokenizer(texts, padding=True, return_tensors="pt")["input_ids"])


def test_batch_equals_one_by_one(tokenizer):
    texts = STRINGS[:300]
    assert tokenizer(texts)["input_ids"] == [tokenizer(text)["input_ids"] for text in texts]


def test_offsets_point_into_the_text(tokenizer):
    text = "你好，小苏 hello"
    encoded = tokenizer(text, return_offsets_mapping=True)
    spans = encoded["offset_mapping"][2:]
    assert spans[-1][1] == len(text)
    assert all(start <= end <= len(text) for start, end in spans)


def test_save_and_reload(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "once")
    once = AutoTokenizer.from_pretrained(tmp_path / "once")
    assert_same_behaviour(tokenizer, once)
    once.save_pretrained(tmp_path / "twice")
    assert_same_behaviour(tokenizer, AutoTokenizer.from_pretrained(tmp_path / "twice"))


def test_saved_settings_do_not_point_to_remote_code(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == "ChatGLMTokenizer"
    assert "auto_map" not in settings


def test_pickle_and_deepcopy(tokenizer):
    assert_same_behaviour(tokenizer, pickle.loads(pickle.dumps(tokenizer)))
    assert_same_behaviour(tokenizer, copy.deepcopy(tokenizer))


def test_missing_tokenizer_model(tmp_path):
    directory = new_directory(tmp_path / "model", None)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model \[missing file\].*model"):
        AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("kept", [0, 4, 1000, -7], ids=["empty", "4 bytes", "1000 bytes", "all but 7 bytes"])
def test_truncated_tokenizer_model(tmp_path, tiny_model, kept):
    directory = new_directory(tmp_path / "model", tiny_model.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"\[invalid tokenizer\.model\]"):
        AutoTokenizer.from_pretrained(directory)


def test_tokenizer_model_that_is_something_else(tmp_path):
    directory = new_directory(tmp_path / "model", b"version https://git-lfs.github.com/spec/v1\nsize 1018370\n")
    with pytest.raises(CheckpointError, match=r"\[invalid tokenizer\.model\]"):
        AutoTokenizer.from_pretrained(directory)


def test_tokenizer_of_another_model(tmp_path):
    """Without byte fallback there is no newline token, and a reply could never end."""
    foreign = train_tokenizer(tmp_path, byte_fallback=False, vocab_size=60)
    directory = new_directory(tmp_path / "model", foreign.read_bytes())
    with pytest.raises(CheckpointError, match="not CharacterGLM's tokenizer"):
        AutoTokenizer.from_pretrained(directory)


def test_damaged_tokenizer_json(tmp_path, tiny_model):
    directory = new_directory(tmp_path / "model", tiny_model.read_bytes())
    AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json .*\[invalid JSON\]"):
        AutoTokenizer.from_pretrained(tmp_path / "saved")
