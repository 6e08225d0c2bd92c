"""The GGUF file, asked through llama.cpp itself: the same token ids, prompts, replies, stops and sampling as here."""

import json
import random
import re
import shutil

import numpy as np
import pytest
import torch
from reference import (
    EXAMPLES,
    NARRATED,
    bot,
    copy_compact,
    edit_json,
    edit_weights,
    persona,
    shared,
    train_tokenizer,
    user,
)
from typer.testing import CliRunner

import helpers
from helpers import paths
from helpers.characters.dialogues import load_dialogues
from helpers.chat.fitting import build_turns, encode_prompt
from helpers.chat.generation import STOP_IDS, GenerationParameters, model_defaults
from helpers.cli.app import app
from helpers.errors import CheckpointError, HelpersError
from helpers.export.template import LINE_BREAKS
from helpers.finetune.lora import add_lora
from helpers.serving.schemas import ChatRequest

pytest.importorskip("gguf", reason="gguf is not installed: pip install -r requirements.txt")
engine = pytest.importorskip("xllamacpp", reason="xllamacpp (llama.cpp) is not installed: requirements-dev.txt")

import gguf  # noqa: E402
import httpx  # noqa: E402

from helpers.export.gguf import export_gguf  # noqa: E402
from helpers.export.gguf_adapter import export_adapter  # noqa: E402

NEW_TOKENS = 24
CONTROL = [
    "<unk>",
    "<s>",
    "</s>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<0x0A>",
    "[gMASK]<sop>",
    "[PAD4095]",
]
HOSTILE = [
    *CONTROL,
    *LINE_BREAKS,
    "\u3000",
    "\xa0",
    " ",
    "▁",
    "<",
    "[",
    "]",
    "sop",
    "gMASK]",
    "\\n",
    "{{",
    "%}",
    "'",
    "😀",
]


class Engine:
    """llama-server on a GGUF file, on one thread: batches of other sizes would add up in another order."""

    def __init__(self, file, lora=None):
        settings = engine.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel = str(file), 2048, 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        # Attention is computed in float16 otherwise, which decides near ties: 119 of 120 greedy replies are the same then.
        settings.cache_type_k = settings.cache_type_v = engine.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = engine.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.warmup, settings.use_jinja, settings.verbosity = False, True, 0
        if lora:
            adapter = engine.CommonAdapterLoraInfo()
            adapter.path, adapter.scale = str(lora), 1.0
            settings.lora_adapters = [adapter]
        self.server = engine.Server(settings)
        self.client = httpx.Client(base_url=self.server.listening_address, timeout=120, trust_env=False)

    def post(self, path: str, **body) -> dict:
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ids(self, text: str) -> list[int]:
        return self.post("/tokenize", content=text, parse_special=True)["tokens"]

    def prompt(self, messages, **body) -> list[int]:
        """The ids of a chat's prompt, as the server makes them itself."""
        return self.ids(self.post("/apply-template", messages=messages, **body)["prompt"])

    def chat(self, messages, session_meta, **options) -> list[int]:
        """The ids of a reply."""
        options = {"temperature": 0, "max_tokens": NEW_TOKENS, **options}
        arguments = {"chat_template_kwargs": {"session_meta": session_meta}, "return_tokens": True, "verbose": True}
        answer = self.post("/v1/chat/completions", messages=messages, **arguments, **options)
        return answer["__verbose"]["tokens"]


@pytest.fixture(scope="module")
def own():
    return helpers.load("nano", dtype="float32")


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return Engine(export_gguf("nano", tmp_path_factory.mktemp("gguf") / "nano.gguf", kind="f32"))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The real vocabulary, on a network of almost no size."""
    source = shared("golden/real_tokenizer")
    model, tokenizer = helpers.load(source, dtype="float32")
    return Engine(export_gguf(source, tmp_path_factory.mktemp("gguf") / "real.gguf", kind="f16")), tokenizer


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter that changes what Nano says, with a persona beside it."""
    model, _ = helpers.load("nano", dtype="float32")
    torch.manual_seed(0)
    tuned = add_lora(model, "all-linear", r=4)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    directory = tmp_path_factory.mktemp("adapter")
    tuned.save_pretrained(directory)
    (directory / "card.json").write_text(json.dumps(persona(bot_name="鲁智深", bot_info="和尚。\n爱'酒'\\{{x}}")))
    return directory


# --- what is text ----------------------------------------------------------------------------------------------------


def texts() -> list[str]:
    """Lines of the shipped dialogues, and what was put together to do harm."""
    generator = random.Random(0)
    lines = [line for dialogue in load_dialogues()[:120] for pair in dialogue.history for line in pair if line]
    made = ["".join(generator.choice(HOSTILE) for _ in range(generator.randint(1, 8))) for _ in range(200)]
    return [*CONTROL, "", " ", "  two  spaces ", "a\tb", "👩‍👩‍👧‍👦", "\x00"[:0], *generator.sample(lines, 320), *made]


@pytest.mark.parametrize("vocabulary", ["nano", "real"])
def test_text_has_the_same_ids_and_none_of_control(vocabulary, request, own):
    asked, tokenizer = (
        (request.getfixturevalue("nano"), own[1]) if vocabulary == "nano" else request.getfixturevalue("real")
    )
    compared = [text for text in texts() if text]
    assert len(compared) > 500
    special = set(tokenizer.convert_tokens_to_ids([*CONTROL[:8]])) | {13}
    for text in compared:
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert asked.ids(text) == expected, text
        assert not special & set(expected) or "\n" in text


def hostile(generator, parts: int) -> str:
    return "".join(generator.choice(HOSTILE) for _ in range(generator.randint(1, parts)))


def test_no_text_can_forge_a_turn_or_a_control_token(nano, own):
    tokenizer, generator = own[1], random.Random(1)
    for _ in range(40):
        meta = persona(bot_name="x" + hostile(generator, 3), user_name=generator.choice(["sMASK", "gMASK", "eop"]))
        meta |= {"bot_info": hostile(generator, 6), "user_info": hostile(generator, 6)}
        messages = [user(hostile(generator, 8)), bot(hostile(generator, 8)), user("x" + hostile(generator, 8))]
        ids = nano.prompt(messages, chat_template_kwargs={"session_meta": meta})
        # Python's strip() also knows a unit separator; nobody types one, and the engine's does not.
        assert ids == prompt_ids(tokenizer, messages, meta), (messages, meta)
        assert not set(tokenizer.convert_tokens_to_ids(CONTROL[:8])) & set(ids[2:])


@pytest.mark.parametrize("line_break", LINE_BREAKS, ids=ascii)
def test_a_line_break_becomes_a_space(nano, line_break):
    messages = [user(f"a{line_break}[苏梦远]b")]
    text = nano.post("/apply-template", messages=messages, chat_template_kwargs={"session_meta": persona()})["prompt"]
    assert text.splitlines()[-2:] == ["[陆星辰]a [苏梦远]b", "[苏梦远]"]


# --- prompts ---------------------------------------------------------------------------------------------------------


def prompt_ids(tokenizer, messages, meta) -> list[int]:
    return tokenizer.apply_chat_template(messages, session_meta=meta, add_generation_prompt=True)["input_ids"]


SYSTEM = {"role": "system", "content": "他怕水。"}
REQUESTS = {
    "nobody": {"messages": [user("你好")]},
    "null": {"messages": [user("你好")], "chat_template_kwargs": {"session_meta": None}},
    "system message": {"messages": [SYSTEM, user("你好")]},
    "two system messages": {
        "messages": [SYSTEM, {**SYSTEM, "content": "他</s>爱酒"}, user("你好"), bot("好"), user("?")]
    },
    "empty system message": {"messages": [{"role": "system", "content": "\u3000"}, user("你好")]},
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
    "paragraphs": {
        "messages": [
            user("\u3000\u3000你好。\r\n\u3000\u3000再见\xa0 \u3000\n"),
            bot("\u3000走了"),
            user("\xa0\u2003嗯"),
        ]
    },
    "a greeting first": {"messages": [bot("（抬头）你来了。"), user("好些了？😀")]},
    "example dialogue": {"messages": EXAMPLES},
    **{what: {"messages": messages} for what, messages in NARRATED.items()},
}


@pytest.mark.parametrize("what", REQUESTS)
def test_a_request_gives_the_prompt_of_our_own_server(nano, own, what):
    body = REQUESTS[what]
    meta, turns = ChatRequest.model_validate(body).conversation(None)
    assert nano.prompt(**body) == prompt_ids(own[1], [message for turn in turns for message in turn], meta)


BAD = {
    "no name": ([user("a")], {"bot_info": "x"}),
    "blank name": ([user("a")], persona(bot_name="\u3000\n")),
    "null name": ([user("a")], persona(user_name=None)),
    "number": ([user("a")], persona(bot_info=5)),
    "text for a persona": ([user("a")], "苏梦远"),
    "unknown role": ([{"role": "narrator", "content": "a"}], persona()),
    "only a system message": ([SYSTEM], persona()),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_refused(nano, what):
    messages, meta = BAD[what]
    body = {"messages": messages, "chat_template_kwargs": {"session_meta": meta}}
    answer = nano.client.post("/v1/chat/completions", json=body)
    assert answer.status_code >= 400
    assert re.search(r"\[(invalid persona|unknown role|no user message)", answer.json()["error"]["message"])


# --- replies ---------------------------------------------------------------------------------------------------------


def greedy(model, tokenizer, dialogue, penalty: float) -> list[int]:
    """What `helpers.chat` writes, as ids."""
    query, history = dialogue.history[-1][0], dialogue.history[:-1]
    prompt = torch.tensor([encode_prompt(tokenizer, dialogue.card, query, history)])
    chosen = {**model_defaults(model), "do_sample": False, "repetition_penalty": penalty}
    settings = GenerationParameters.check(chosen).to_config(NEW_TOKENS)
    return model.generate(prompt, generation_config=settings)[0, prompt.shape[1] :].tolist()


def messages_of(dialogue) -> list[dict]:
    return [message for turn in build_turns(dialogue.history[-1][0], dialogue.history[:-1]) for message in turn]


def same_replies(asked: Engine, model, tokenizer, count: int, penalties) -> list[list[int]]:
    replies = []
    dialogues = load_dialogues()
    for number, dialogue in enumerate(dialogues[:: len(dialogues) // count][:count]):
        penalty = penalties[number % len(penalties)]
        expected = greedy(model, tokenizer, dialogue, penalty)
        found = asked.chat(messages_of(dialogue), dialogue.card.model_dump(), repeat_penalty=penalty)
        assert found == expected, (dialogue.card.bot_name, penalty)
        replies.append(found)
    return replies


def test_greedy_replies_are_those_of_chat(nano, own):
    replies = same_replies(nano, *own, count=9, penalties=(1.0, 1.05, 1.3))
    assert len({tuple(reply) for reply in replies}) > 4 and any(reply[-1] == 13 for reply in replies)


@pytest.mark.slow
def test_many_greedy_replies(nano, own):
    same_replies(nano, *own, count=120, penalties=(1.0, 1.05, 1.3))


def test_the_reply_that_a_reader_sees(nano, own):
    meta = helpers.get_character("林黛玉").model_dump()
    expected, _ = helpers.chat(*own, meta, "妹妹今日可好些了？", do_sample=False)
    body = {"messages": [user("妹妹今日可好些了？")], "temperature": 0, "chat_template_kwargs": {"session_meta": meta}}
    answer = nano.post("/v1/chat/completions", **body)["choices"][0]
    assert answer["message"]["content"].strip() == expected and answer["finish_reason"] == "stop"


@pytest.mark.parametrize("stop", STOP_IDS)
def test_both_tokens_end_a_reply(nano, stop):
    answer = nano.post(
        "/completion", prompt="你好", n_predict=8, temperature=0, return_tokens=True, logit_bias=[[stop, 1000.0]]
    )
    assert answer["tokens"] == [stop] and answer["stop_type"] == "eos"


def test_sampling_is_the_models_own(nano, own):
    found = nano.client.get("/props").json()["default_generation_settings"]["params"]
    defaults = GenerationParameters.check(model_defaults(own[0]))
    expected = {"temperature": defaults.temperature, "top_k": defaults.top_k, "top_p": defaults.top_p, "min_p": 0.0}
    expected |= {"repeat_penalty": defaults.repetition_penalty, "repeat_last_n": 2048}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["samplers"] == ["penalties", "temperature", "top_k", "top_p"]


# --- adapters --------------------------------------------------------------------------------------------------------


def test_an_adapter_in_the_weights(adapter, tmp_path):
    asked = Engine(export_gguf("nano", tmp_path / "merged.gguf", kind="f32", adapter=adapter))
    same_replies(asked, *helpers.load("nano", dtype="float32", adapter=adapter), count=3, penalties=(1.0, 1.3))
    text = asked.post("/apply-template", messages=[user("你好")])["prompt"]
    assert "以下是一段鲁智深和陆星辰之间的对话" in text and "关于鲁智深的信息：和尚。 爱'酒'\\{{x}}\n" in text


def test_an_adapter_beside_the_base(adapter, own, tmp_path):
    base = export_gguf("nano", tmp_path / "nano.gguf", kind="f32")
    asked = Engine(base, lora=export_adapter("nano", adapter, tmp_path / "lora.gguf"))
    tuned = helpers.load("nano", dtype="float32", adapter=adapter)
    replies = same_replies(asked, *tuned, count=3, penalties=(1.0, 1.3))
    dialogues = load_dialogues()
    assert replies != [greedy(*own, dialogue, 1.0) for dialogue in dialogues[:: len(dialogues) // 3][:3]]


@pytest.mark.parametrize("change", [{"use_dora": True}, {"alpha_pattern": {"q_proj": 2}}], ids=str)
def test_an_adapter_that_llama_cpp_would_read_wrongly(adapter, tmp_path, change, monkeypatch):
    tuned = helpers.load("nano", adapter=adapter)
    for name, value in change.items():
        setattr(tuned[0].peft_config["default"], name, value)
    monkeypatch.setattr("helpers.export.gguf_adapter.load", lambda *_, **__: tuned)
    with pytest.raises(HelpersError, match=r"\[not plain LoRA\]"):
        export_adapter("nano", adapter, tmp_path / "lora.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_rank_stabilised_adapter_keeps_its_strength(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", lambda config: config.update(use_rslora=True))
    reader = gguf.GGUFReader(export_adapter("nano", tmp_path / "adapter", tmp_path / "lora.gguf"))
    alpha = json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"]
    assert reader.get_field("adapter.lora.alpha").contents() == pytest.approx(2 * alpha)  # r is 4


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def source(tmp_path, tokenizer_model):
    return copy_compact(tmp_path / "source", tokenizer_model)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_every_kind_runs_and_is_as_large_as_it_says(kind, own, tmp_path):
    file = export_gguf("nano", tmp_path / f"{kind}.gguf", kind=kind)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    weights = own[0].state_dict()
    assert len(stored) == len(weights)
    expected = weights["model.layers.2.mlp.down_proj.weight"].numpy()
    found = gguf.quants.dequantize(stored["blk.2.ffn_down.weight"].data, stored["blk.2.ffn_down.weight"].tensor_type)
    assert np.abs(found - expected).max() <= {"f16": 0, "bf16": 2**-8, "q8_0": 2**-7}[kind] * np.abs(expected).max()
    assert stored["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    answer = Engine(file).post("/completion", prompt="你好", n_predict=4)
    assert answer["tokens_predicted"] >= 1


def test_a_model_of_other_settings(source, tmp_path):
    """Epsilon, rope and rows that no block of 32 fits are those of the config; the vendor's sampling where it has none."""
    edit_json(source / "config.json", lambda config: config.update(rope_ratio=50, layernorm_epsilon=1e-3))
    model, tokenizer = helpers.load(source, dtype="float32")
    reader = gguf.GGUFReader(export_gguf(source, tmp_path / "small.gguf", kind="q8_0"))
    fields = {
        name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.to")
    }
    assert fields["chatglm.rope.freq_base"] == model.config.rope_parameters["rope_theta"] == 500_000
    assert fields["chatglm.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-3)
    assert fields["general.sampling.penalty_repeat"] == pytest.approx(1.3)
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    assert len(tokens) == model.config.vocab_size > len(tokenizer)


def test_tied_embeddings(source, tmp_path):
    edit_json(source / "config.json", lambda config: config.update(tie_word_embeddings=True))
    edit_weights(source, lambda weights: weights.pop("transformer.output_layer.weight", None))
    edit_json(
        source / "pytorch_model.bin.index.json",
        lambda index: index["weight_map"].pop("transformer.output_layer.weight"),
    )
    file = export_gguf(source, tmp_path / "tied.gguf", kind="f32")
    assert "output.weight" not in {tensor.name for tensor in gguf.GGUFReader(file).tensors}
    assert Engine(file).ids("你好")


# --- refused, interrupted --------------------------------------------------------------------------------------------


def test_an_existing_file_is_left_alone(source, tmp_path):
    (tmp_path / "mine.gguf").write_text("mine")
    with pytest.raises(HelpersError, match=r"\[target exists\]"):
        export_gguf(source, tmp_path / "mine.gguf")
    assert (tmp_path / "mine.gguf").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


BAD_SOURCES = {
    "quantised": (lambda config: config.update(quantization_config={"quant_method": "x"}), r"\[quantised model\]"),
    "another model": (lambda config: config.update(model_type="llama"), r"\[not a CharacterGLM directory\]"),
}


@pytest.mark.parametrize("what", BAD_SOURCES)
def test_a_bad_model_is_refused(source, tmp_path, what):
    change, pattern = BAD_SOURCES[what]
    edit_json(source / "config.json", change)
    with pytest.raises(HelpersError, match=pattern):
        export_gguf(source, tmp_path / "new.gguf")
    assert list(tmp_path.iterdir()) == [source]


def test_a_number_too_large_for_float16(source, tmp_path):
    def enlarge(weights):
        name = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"
        if name in weights:
            weights[name][0, 0] = 1e6

    edit_weights(source, enlarge)
    with pytest.raises(HelpersError, match=r"blk\.1\.ffn_down.*\[too large for float16\]"):
        export_gguf(source, tmp_path / "new.gguf", kind="f16")
    assert list(tmp_path.iterdir()) == [source]
    assert export_gguf(source, tmp_path / "new.gguf", kind="bf16").is_file()


def test_an_adapter_of_another_base(adapter, source, tmp_path):
    for write in (
        lambda file: export_gguf(source, file, adapter=adapter),
        lambda file: export_adapter(source, adapter, file),
    ):
        with pytest.raises(CheckpointError, match=r"\[adapter does not fit\]"):
            write(tmp_path / "new.gguf")
    assert list(tmp_path.iterdir()) == [source]


def test_a_disk_too_small(small_disk, monkeypatch):
    with pytest.raises(HelpersError, match=r"\[not enough disk space\]"):
        export_gguf("nano", small_disk / "nano.gguf")
    monkeypatch.setattr(paths, "check_disk_space", lambda *_: None)  # it looked large enough before
    with pytest.raises(HelpersError, match=r"\[disk full\]"):
        export_gguf("nano", small_disk / "nano.gguf")
    assert not any(small_disk.iterdir())


def test_interrupted_with_ctrl_c(source, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_gguf(source, tmp_path / "new.gguf")
    assert list(tmp_path.iterdir()) == [source] and "[interrupted]" in capsys.readouterr().out


def test_command_line(adapter, tmp_path):
    runner, target = CliRunner(), tmp_path / "nano.gguf"
    done = runner.invoke(app, ["export", "--gguf", "q8_0", "--model", "nano", str(target)])
    assert done.exit_code == 0 and "[exported]" in done.output and target.stat().st_mode & 0o777 == 0o644
    unknown = runner.invoke(app, ["export", "--gguf", "q4_k_m", "--model", "nano", str(tmp_path / "new.gguf")])
    assert isinstance(unknown.exception, HelpersError) and "[unknown GGUF kind]" in str(unknown.exception)
    alone = ["export", "--model", "nano", "--adapter", str(adapter), "--adapter-gguf", str(tmp_path / "lora.gguf")]
    assert runner.invoke(app, alone).exit_code == 0 and (tmp_path / "lora.gguf").is_file()
    for senseless in (["--gguf", "f16", "--dtype", "float32"], ["--adapter-gguf"], ["--gguf", "f16", "--adapter-gguf"]):
        assert runner.invoke(app, ["export", "--model", "nano", *senseless, str(tmp_path / "new")]).exit_code == 2
