"""The exported folder: stock transformers reads the same prompt and writes the same words, and what is refused."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jinja2
import jinja2.meta
import numpy as np
import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from reference import (
    COMPACT,
    EXAMPLES,
    INDEX,
    NANO,
    NARRATED,
    SHARDS,
    bot,
    copy_compact,
    edit_json,
    edit_weights,
    persona,
    shared,
    train_tokenizer,
    user,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GlmForCausalLM
from typer.testing import CliRunner

import helpers
from helpers import paths
from helpers.characters.personas import DEFAULT_CHARACTER
from helpers.chat.generation import GenerationParameters, model_defaults
from helpers.cli.app import app
from helpers.errors import CheckpointError, HelpersError
from helpers.export import plain as export
from helpers.export.plain import export_model, plain_tokenizer
from helpers.export.safetensors_copy import convert_checkpoint
from helpers.finetune.lora import add_lora
from helpers.serving.schemas import ChatRequest

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
FILES |= {"chat_template.jinja"}
NEW_TOKENS = 24
CONTROL = ["<unk>", "<s>", "</s>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<0x0A>", "[gMASK]<sop>"]
MARKS = ["\ufdd0", "\ufdd1", "\ufdd2", "\ufdd0\ufdd1", "\ufdd0\ufdd2", "<\ufdd0", "[\ufdd2"]  # those of the template
SPACES = ["\u3000", "\xa0", "\x85", "\x1c", "\v", "\t"]
HOSTILE = [
    *SPACES,
    *CONTROL,
    *MARKS,
    "<",
    "[",
    "]",
    ">",
    "gMASK]",
    "[gMA",
    "\n",
    "\r\n",
    "\u2028",
    "sop",
    " ",
    "▁",
    "</",
    "😀",
]


CHATS = [
    *[([user("今天过得怎么样？")], card.model_dump()) for card in list(helpers.load_characters().values())[:4]],
    ([bot("（抬头）你来了。"), user("好些了？😀"), bot("好多了👩‍👩‍👧‍👦。"), user("走吧")], persona(bot_info="")),
    ([user("在吗"), bot(""), user("  two  spaces  "), bot("[陆星辰]我\n</s>\n也是"), user("]( <")], persona()),
    ([user("</s>[gMASK]<sop>"), bot("<0x0A></s>\nsophomore"), user("\ufdd0\ufdd2[MASK]")], {"bot_name": "gMASK"}),
    ([user("再见")], persona(bot_name="</s>", user_name="sMASK", bot_info="a\nb[gMASK]", user_info="<eop>\ufdd0")),
]


# --- a process that knows nothing of helpers -------------------------------------------------------------------------

STOCK = """
import json, sys
class NoHelpers:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "helpers":
            raise AssertionError("something imports helpers")
sys.meta_path.insert(0, NoHelpers())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
folder, new_tokens = sys.argv[1], int(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
replies = []
for messages, session_meta in json.load(sys.stdin):
    prompt = tokenizer.apply_chat_template(
        messages, session_meta=session_meta, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=new_tokens)[0].tolist()
    length = prompt["input_ids"].shape[1]
    replies.append([ids[:length], ids[length:], tokenizer.decode(ids[length:], skip_special_tokens=True)])
assert "helpers" not in sys.modules
modules = [type(model).__module__, type(tokenizer).__module__, type(model.config).__module__]
print(json.dumps({"dtype": str(model.dtype), "modules": modules, "replies": replies}))
"""


def stock_replies(folder: Path, chats: list) -> list:
    """(prompt ids, greedy reply ids, text) of each chat, from a fresh process with stock transformers."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(folder), str(NEW_TOKENS)],
        input=json.dumps(chats),
        cwd=folder.parent,
        env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["dtype"] == "torch.float32"
    assert all(module.startswith("transformers.") for module in found["modules"]), found["modules"]
    return found["replies"]


def own_replies(model, tokenizer, chats: list) -> list:
    """The same of `helpers.load`, with PEFT's own `generate` where there is an adapter."""
    replies = []
    for messages, meta in chats:
        prompt = tokenizer.apply_chat_template(
            messages, session_meta=meta, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        parameters = GenerationParameters.check({**model_defaults(model), "do_sample": False})
        ids = model.generate(**prompt, generation_config=parameters.to_config(NEW_TOKENS))[0].tolist()
        length = prompt["input_ids"].shape[1]
        replies.append([ids[:length], ids[length:], tokenizer.decode(ids[length:], skip_special_tokens=True)])
    return replies


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return export_model("nano", tmp_path_factory.mktemp("base") / "exported", dtype="float32")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter that changes what Nano says, with a persona beside it."""
    model, _ = helpers.load("nano", dtype="float32")
    torch.manual_seed(0)
    tuned = add_lora(model, "all-linear", r=4)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    directory = tmp_path_factory.mktemp("adapter")
    tuned.save_pretrained(directory)
    (directory / "card.json").write_text(json.dumps(persona(bot_name="鲁智深")))
    return directory


def test_same_prompts_and_same_words_without_helpers(base):
    assert {file.name for file in base.iterdir()} == FILES
    model, tokenizer = helpers.load("nano", dtype="float32")
    found = stock_replies(base, CHATS)
    assert found == own_replies(model, tokenizer, CHATS)
    assert any(ids[-1] == 13 for _, ids, _ in found), "a newline ends a reply"
    ((message,), meta), (_, _, text) = CHATS[0], found[0]
    reply, _ = helpers.chat(model, tokenizer, meta, message["content"], do_sample=False, max_new_tokens=NEW_TOKENS)
    assert text.strip() == reply, "the words that a reader of helpers.chat sees"


def test_with_an_adapter_merged(adapter, base, tmp_path):
    folder = export_model("nano", tmp_path / "exported", adapter=adapter, dtype="float32")
    tuned = own_replies(*helpers.load("nano", dtype="float32", adapter=adapter), CHATS)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert type(plain) is GlmForCausalLM
    assert own_replies(plain, AutoTokenizer.from_pretrained(folder), CHATS) == tuned
    assert tuned != own_replies(*helpers.load("nano", dtype="float32"), CHATS), "the adapter has an effect"
    default = AutoTokenizer.from_pretrained(folder).apply_chat_template([user("你好")], tokenize=False)
    assert "以下是一段鲁智深和陆星辰之间的对话" in default
    assert {file.name for file in folder.iterdir()} == FILES


# --- the prompt ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["nano", "real"])
def tokenizers(request, tmp_path_factory):
    """Our tokenizer, and its stock copy as it is read from a folder."""
    own = AutoTokenizer.from_pretrained(NANO if request.param == "nano" else shared("golden/real_tokenizer"))
    folder = tmp_path_factory.mktemp("tokenizer")
    plain_tokenizer(own, helpers.get_character(DEFAULT_CHARACTER), 2048).save_pretrained(folder)
    stock = AutoTokenizer.from_pretrained(folder)
    assert type(stock).__module__.startswith("transformers.")
    return own, stock


def prompt_ids(tokenizer, messages, **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)["input_ids"]


def hostile_text(generator, parts: int) -> str:
    return "".join(generator.choice(HOSTILE) for _ in range(generator.randint(1, parts)))


def test_no_text_can_spell_a_control_token(tokenizers):
    own, stock = tokenizers
    assert {token.content for token in stock.added_tokens_decoder.values()} <= set(CONTROL)
    generator = random.Random(0)
    special = set(stock.added_tokens_decoder)
    for _ in range(400):
        name = lambda: "x" + hostile_text(generator, 3)  # noqa: E731
        meta = persona(bot_name=generator.choice([*CONTROL, "gMASK", "sMASK", "MASK", name()]), user_name=name())
        meta |= {"bot_info": hostile_text(generator, 6), "user_info": hostile_text(generator, 6)}
        messages = [user(hostile_text(generator, 8)), bot(hostile_text(generator, 8)), user(hostile_text(generator, 8))]
        ids = prompt_ids(stock, messages, session_meta=meta)
        assert ids == prompt_ids(own, messages, session_meta=meta), (messages, meta)
        assert not special & set(ids[2:])
        assert stock.convert_ids_to_tokens(ids[:2]) == ["[gMASK]", "<sop>"]


@pytest.mark.parametrize(("messages", "meta"), CHATS)
def test_prompt_of_a_chat(tokenizers, messages, meta):
    own, stock = tokenizers
    assert prompt_ids(stock, messages, session_meta=meta) == prompt_ids(own, messages, session_meta=meta)
    without = [tokenizer.apply_chat_template(messages, session_meta=meta)["input_ids"] for tokenizer in tokenizers]
    assert without[0] == without[1]


def test_plain_text_gets_the_prefix(tokenizers):
    own, stock = tokenizers
    for text in ("你好", " two  spaces\n", "a\tb😀"):
        assert stock(text)["input_ids"] == own(text)["input_ids"]
        ids = own(text, add_special_tokens=False)["input_ids"]
        assert stock.decode(ids) == own.decode(ids) == text
    assert (stock.eos_token_id, stock.pad_token_id, stock.unk_token_id, stock.padding_side) == (2, 0, 0, "left")


SYSTEM = {"role": "system", "content": "他怕水。"}
REQUESTS = {
    "nobody": {"messages": [user("你好")]},
    "null": {"messages": [user("你好")], "chat_template_kwargs": {"session_meta": None}},
    "system message": {"messages": [SYSTEM, user("你好")]},
    "two system messages": {
        "messages": [SYSTEM, {"role": "developer", "content": "他</s>爱酒"}, user("你好"), bot("好"), user("?")]
    },
    "empty system message": {"messages": [{"role": "system", "content": " "}, user("你好")]},
    "persona": {"messages": [user("你好")], "chat_template_kwargs": {"session_meta": persona()}},
    "name only": {"messages": [user("你好")], "chat_template_kwargs": {"session_meta": {"bot_name": "老船长"}}},
    "null infos": {
        "messages": [SYSTEM, user("你好")],
        "chat_template_kwargs": {"session_meta": persona(bot_info=None, user_info=None)},
    },
    "persona and system message": {
        "messages": [SYSTEM, user("你好")],
        "chat_template_kwargs": {"session_meta": persona(greeting="你来了。")},
    },
    "example dialogue": {"messages": EXAMPLES},
    **{what: {"messages": messages} for what, messages in NARRATED.items()},
}


@pytest.mark.parametrize("what", REQUESTS)
def test_a_request_to_vllm_gives_the_prompt_of_our_own_server(tokenizers, what):
    own, stock = tokenizers
    body = REQUESTS[what]
    meta, turns = ChatRequest.model_validate(body).conversation(None)
    expected = prompt_ids(own, [message for turn in turns for message in turn], session_meta=meta)
    assert prompt_ids(stock, body["messages"], **body.get("chat_template_kwargs", {})) == expected


def test_vllm_passes_on_what_the_template_asks_for(tokenizers):
    """vLLM drops those chat_template_kwargs that are no free variable of the template."""
    free = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(tokenizers[1].chat_template))
    assert free == {"messages", "session_meta", "add_generation_prompt", "raise_exception"}


BAD_CHATS = {
    "no name": ([user("a")], {"bot_info": "x"}),
    "blank name": ([user("a")], persona(bot_name=" \n")),
    "null name": ([user("a")], persona(user_name=None)),
    "number": ([user("a")], persona(bot_info=5)),
    "wide spaces for a name": ([user("a")], persona(bot_name="\u3000\u2003")),
    "number for an info": ([user("a")], persona(bot_info="x", user_info=0)),
    "text for a persona": ([user("a")], "苏梦远"),
    "unknown role": ([{"role": "tool", "content": "a"}], persona()),
    "number for a text": ([user(5)], persona()),
    "only a system message": ([SYSTEM], persona()),
    "number for a system message": ([{"role": "system", "content": 5}, user("a")], persona()),
}


@pytest.mark.parametrize("what", BAD_CHATS)
def test_what_the_template_refuses(tokenizers, what):
    messages, meta = BAD_CHATS[what]
    with pytest.raises(jinja2.TemplateError, match=r"\[(invalid persona|unknown role|content must be|no user message)"):
        prompt_ids(tokenizers[1], messages, session_meta=meta)


# --- weights and settings --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def source(tmp_path, tokenizer_model):
    return copy_compact(tmp_path / "source", tokenizer_model)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=torch.arange(5, 60)[None]).logits


def assert_same_logits(folder: Path, source: Path) -> None:
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(found) is GlmForCausalLM
    assert torch.equal(logits(found), logits(helpers.load(source, dtype="float32")[0]))


def test_golden_logits_through_the_export(source, tmp_path):
    """Against what the original modelling code computed."""
    golden = np.load(COMPACT / "golden.npz")
    length = max(int(name.removeprefix("input_ids_")) for name in golden if name.startswith("input_ids_"))
    model = AutoModelForCausalLM.from_pretrained(export_model(source, tmp_path / "exported"), dtype=torch.float32)
    with torch.no_grad():
        found = model(input_ids=torch.from_numpy(golden[f"input_ids_{length}"])[None]).logits[0, -1]
    assert torch.allclose(found, torch.from_numpy(golden[f"last_logits_{length}"]), rtol=0, atol=1e-5)


def test_stored_bits_are_kept(tmp_path):
    """By default nothing is rounded: q, k and v together are the original tensor, in its dtype."""
    stored = load_file(export_model("nano", tmp_path / "exported") / "model.safetensors")
    original = {name: tensor for shard in SHARDS for name, tensor in torch.load(NANO / shard).items()}
    for kind in ("weight", "bias"):
        parts = [stored[f"model.layers.3.self_attn.{part}_proj.{kind}"] for part in "qkv"]
        assert torch.equal(
            torch.cat(parts), original[f"transformer.encoder.layers.3.self_attention.query_key_value.{kind}"]
        )
    assert torch.equal(stored["lm_head.weight"], original["transformer.output_layer.weight"])
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


def test_the_dtype_of_the_files_counts_not_that_of_the_config(source, tmp_path):
    """As in the 6B, whose config.json says float16."""
    edit_weights(source, lambda stored: stored.update({name: tensor.bfloat16() for name, tensor in stored.items()}))
    edit_json(source / "config.json", lambda config: config.update(torch_dtype="float16"))
    folder = export_model(source, tmp_path / "exported")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


SETTINGS = {
    "rope_ratio": {"rope_ratio": 50},
    "epsilon": {"layernorm_epsilon": 1e-3},
}


@pytest.mark.parametrize("what", SETTINGS)
def test_settings_that_change_the_numbers_are_kept(source, tmp_path, what):
    before = logits(helpers.load(source, dtype="float32")[0])
    edit_json(source / "config.json", lambda config: config.update(SETTINGS[what]))
    assert not torch.equal(logits(helpers.load(source, dtype="float32")[0]), before)
    assert_same_logits(export_model(source, tmp_path / "exported"), source)


@pytest.mark.parametrize("stored", [False, True], ids=["tied", "said to be tied, but stored and different"])
def test_tied_embeddings(source, tmp_path, stored):
    edit_json(source / "config.json", lambda config: config.update(tie_word_embeddings=True))
    if not stored:
        edit_weights(source, lambda weights: weights.pop("transformer.output_layer.weight", None))
        edit_json(source / INDEX, lambda index: index["weight_map"].pop("transformer.output_layer.weight"))
    folder = export_model(source, tmp_path / "exported")
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is stored
    assert_same_logits(folder, source)


def test_several_files_from_a_safetensors_copy(source, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_SIZE", "50KB")
    copy = convert_checkpoint(source, tmp_path / "copy")
    folder = export_model(copy, tmp_path / "exported")
    assert len(list(folder.glob("*.safetensors"))) > 2 and (folder / "model.safetensors.index.json").is_file()
    assert_same_logits(folder, source)


def test_generation_defaults_are_written_out(source, tmp_path, base):
    """vLLM applies this file. The 6B has none: then the vendor's defaults, as `helpers.chat` has them."""
    (source / "MODEL_LICENSE").write_text("research only")
    folder = export_model(source, tmp_path / "exported")
    chosen = json.loads((folder / "generation_config.json").read_text())
    chosen.pop("transformers_version")
    assert chosen == {
        "do_sample": True,
        "temperature": 0.9,
        "top_k": 100,
        "top_p": 0.9,
        "repetition_penalty": 1.3,
        "max_new_tokens": 512,
        "num_beams": 1,
        "eos_token_id": [2, 13],
        "pad_token_id": 0,
    }
    own = json.loads((NANO / "generation_config.json").read_text())
    assert own.items() <= json.loads((base / "generation_config.json").read_text()).items()
    assert (folder / "MODEL_LICENSE").read_text() == "research only"


def test_nothing_of_ours_in_the_settings(base):
    config = json.loads((base / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("glm", ["GlmForCausalLM"])
    text = "".join((base / name).read_text() for name in FILES if name.endswith(".json"))
    assert not re.search(r"auto_map|chatglm|ChatGLM|CharacterGLM", text)
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in base.iterdir())


# --- refused, interrupted --------------------------------------------------------------------------------------------


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def quantised(source: Path) -> None:
    edit_json(
        source / "config.json", lambda config: config.update(quantization_config={"quant_method": "bitsandbytes"})
    )


BAD_SOURCES = {
    "quantised": (quantised, r"\[quantised model\]"),
    "quantised by the vendor": (
        lambda source: edit_json(source / "config.json", lambda config: config.update(quantization_bit=4)),
        r"\[unsupported setting\]",
    ),
    "another model": (lambda source: (source / "config.json").write_text("{}"), r"\[not a CharacterGLM directory\]"),
    "shard missing": (lambda source: (source / SHARDS[1]).unlink(), r"\[missing shard\]"),
    "no tokenizer": (lambda source: (source / "tokenizer.model").unlink(), r"tokenizer\.model \[missing file\]"),
}


@pytest.mark.parametrize("what", BAD_SOURCES)
def test_a_bad_model_is_refused(source, tmp_path, what):
    change, pattern = BAD_SOURCES[what]
    change(source)
    with pytest.raises(HelpersError, match=pattern):
        export_model(source, tmp_path / "exported")
    assert list(tmp_path.iterdir()) == [source]


def test_an_exported_folder_is_not_exported_again(base, tmp_path):
    with pytest.raises(CheckpointError, match=r"\[not a CharacterGLM directory\]"):
        export_model(base, tmp_path / "again")


def test_bad_targets_are_refused(source, tmp_path):
    (tmp_path / "file").write_text("mine")
    before = content(tmp_path)
    for target, pattern in [
        (source, r"\[target not empty\]"),
        (source / "inside", r"\[target inside the model\]"),
        (tmp_path / "file", r"\[target not empty\]"),
        (tmp_path / "file" / "below", r"\[cannot write\]"),
    ]:
        with pytest.raises(HelpersError, match=pattern):
            export_model(source, target)
        assert content(tmp_path) == before


def test_a_second_export_leaves_the_first_as_it_is(source, tmp_path):
    folder = export_model(source, tmp_path / "exported")
    before = content(folder)
    with pytest.raises(HelpersError, match=r"\[target not empty\]"):
        export_model(source, folder)
    assert content(folder) == before


def of_another_base(directory: Path) -> None:
    (directory / "finetune.json").write_text('{"base": "0123456789abcdef"}')


def with_nan(directory: Path) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    save_file({name: tensor * torch.nan for name, tensor in tensors.items()}, directory / "adapter_model.safetensors")


BAD_ADAPTERS = {
    "not an adapter": (lambda directory: (directory / "adapter_config.json").unlink(), r"\[not an adapter directory\]"),
    "trained on another base": (of_another_base, r"\[adapter for another base\]"),
    "of another shape": (
        lambda directory: edit_json(directory / "adapter_config.json", lambda config: config.update(r=8)),
        r"\[adapter does not fit\]",
    ),
    "not a number": (with_nan, r"\[broken adapter\]"),
}


@pytest.mark.parametrize("what", BAD_ADAPTERS)
def test_a_wrong_adapter_is_refused(adapter, tmp_path, what):
    change, pattern = BAD_ADAPTERS[what]
    shutil.copytree(adapter, tmp_path / "adapter")
    change(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=pattern):
        export_model("nano", tmp_path / "exported", adapter=tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == [tmp_path / "adapter"]


def test_an_adapter_that_cannot_be_merged(tmp_path):
    model, _ = helpers.load("nano", dtype="float32")
    get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained(
        tmp_path / "prefix"
    )
    with pytest.raises(HelpersError, match=r"\[cannot merge\]"):
        export_model("nano", tmp_path / "exported", adapter=tmp_path / "prefix")
    assert list(tmp_path.iterdir()) == [tmp_path / "prefix"]


def test_an_unknown_dtype(tmp_path):
    with pytest.raises(HelpersError, match=r"\[unknown dtype\]"):
        export_model("nano", tmp_path / "exported", dtype="int4")


def test_a_disk_too_small(small_disk, monkeypatch):
    with pytest.raises(HelpersError, match=r"\[not enough disk space\]"):
        export_model("nano", small_disk / "exported")
    monkeypatch.setattr(paths, "check_disk_space", lambda *_: None)  # it looked large enough before
    with pytest.raises(HelpersError, match=r"\[disk full\]"):
        export_model("nano", small_disk / "exported")
    assert not any(small_disk.iterdir())


@pytest.mark.parametrize("exists", [True, False], ids=["into an empty directory", "into a new one"])
@pytest.mark.parametrize("moment", ["save_pretrained", "check_copy", "plain_tokenizer"])
def test_interrupted_with_ctrl_c(source, tmp_path, monkeypatch, exists, moment, capsys):
    target = tmp_path / "exported"
    if exists:
        target.mkdir()
    before = sorted(tmp_path.iterdir())

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    owner = GlmForCausalLM if moment == "save_pretrained" else export
    monkeypatch.setattr(owner, moment, interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_model(source, target)
    assert sorted(tmp_path.iterdir()) == before and "[interrupted]" in capsys.readouterr().out
    assert not exists or not any(target.iterdir())
    monkeypatch.undo()
    assert_same_logits(export_model(source, target), source)


def test_a_folder_that_differs_is_thrown_away(source, tmp_path, monkeypatch):
    def damaging(model, directory, **options):
        save_pretrained(model, directory, **options)
        with (directory / "model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))

    save_pretrained = GlmForCausalLM.save_pretrained
    monkeypatch.setattr(GlmForCausalLM, "save_pretrained", damaging)
    with pytest.raises(HelpersError, match=r"\[copy differs\]"):
        export_model(source, tmp_path / "exported")
    assert list(tmp_path.iterdir()) == [source]


def test_command_line(adapter, tmp_path):
    runner, target = CliRunner(), tmp_path / "exported"
    done = runner.invoke(
        app, ["export", "--model", "nano", "--adapter", str(adapter), "--dtype", "bfloat16", str(target)]
    )
    assert done.exit_code == 0 and "[exported and compared]" in done.output
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert runner.invoke(app, ["export"]).exit_code == 2
    again = runner.invoke(app, ["export", "--model", "nano", str(target)])
    assert isinstance(again.exception, HelpersError)  # main() prints it as one line
