"""Where the reference data of the tests lies, and small CharacterGLM directories made from it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch

REPOSITORY = Path(__file__).parents[2]
NANO = REPOSITORY / "data" / "nano"
COMPACT = REPOSITORY / "tests" / "golden" / "compact"
SHARED = REPOSITORY.parent / "shared"

SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
INDEX = "pytorch_model.bin.index.json"


def shared(name: str) -> Path:
    """A file or directory of the reference data beside the repository; skips the test where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"reference data ../shared/{name} is not on this machine")
    return path


LINES = ("以下是一段和之间的对话。关于的信息：", "你好呀，小苏", "what a sophomore types is text", "[gMASK] sop")


def train_tokenizer(directory: Path, lines: tuple[str, ...] = LINES, **options) -> Path:
    """A `tokenizer.model` of CharacterGLM's kind with 400 pieces, trained in a moment."""
    settings = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 20), model_prefix=str(directory / "tokenizer"), **settings
    )
    (directory / "tokenizer.vocab").unlink()
    return directory / "tokenizer.model"


def copy_compact(directory: Path, tokenizer: Path | None = None) -> Path:
    """A copy of the compact checkpoint that a test may damage, with `tokenizer.model` if one is given."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", INDEX, *SHARDS):
        shutil.copy(COMPACT / name, directory / name)
    if tokenizer is not None:
        shutil.copy(tokenizer, directory / "tokenizer.model")
    return directory


def edit_json(file: Path, change: Callable[[dict], object]) -> None:
    """Change the JSON object in `file` in place."""
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def edit_weights(directory: Path, change: Callable[[dict], object]) -> None:
    """Change the tensors of every shard in place; the index stays as it is."""
    for shard in SHARDS:
        weights = torch.load(directory / shard, weights_only=True)
        change(weights)
        torch.save(weights, directory / shard)


def user(content) -> dict:
    return {"role": "user", "content": content}


def bot(content) -> dict:
    return {"role": "assistant", "content": content}


def persona(**fields) -> dict:
    return {"bot_name": "苏梦远", "bot_info": "歌手。", "user_name": "陆星辰", "user_info": "导演。", **fields}
