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


def system(content: str, **fields) -> dict:
    return {"role": "system", "content": content, **fields}


# Requests whose system messages do not all describe the character: the server and exported templates agree on them.
NARRATED = {
    "in a turn": [system("他怕水。"), user("你好\n "), system(" 门开了。\n"), bot("谁？"), user("我")],
    "after the last turn": [user("你叫什么？"), bot("阿青"), user("冷吗"), system("只说一句话。"), system("小声")],
    "before the user": [user("你好"), bot("嗯"), system("门开了。"), system("\u3000风\n大"), user(" 谁？"), user("我")],
    "before the character": [user("你好"), bot("嗯"), system("门开了。"), bot("谁？"), user("我")],
    "after a greeting": [system("剑客"), bot("你来了。"), system(" "), system("门开了。")],
    "by a developer": [user("你好"), {"role": "developer", "content": "门</s>开[了]。"}, user("谁？")],
}
EXAMPLES = [
    system("剑客"),
    system("冷吗？", name="example_user"),
    system("不冷\n", name="example_assistant"),
    system("话很少", name="narrator"),
    user("你好"),
]
