"""Loading with stock transformers: layouts, variants, damage, malice, adapters, training, and what `load` picks."""

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference import COMPACT, INDEX, REPOSITORY, SHARDS, copy_compact, edit_json, edit_weights, train_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GlmConfig,
    GlmForCausalLM,
    Trainer,
    TrainingArguments,
)
from write_6b_shape import write_random_checkpoint

import helpers
from helpers.errors import CheckpointError, HelpersError, UnsupportedConfigError
from helpers.model import loading
from helpers.model.modeling import REQUIRED_SETTINGS, CharacterGLMConfig, CharacterGLMForCausalLM
from helpers.model.tokenization import ChatGLMTokenizer

IDS = torch.arange(5, 60)[None]
LAYER = "transformer.encoder.layers.1"
EMBEDDING = "transformer.embedding.word_embeddings.weight"
OUTPUT = "transformer.output_layer.weight"
QKV_WEIGHT, QKV_BIAS = (f"{LAYER}.self_attention.query_key_value.{part}" for part in ("weight", "bias"))
SINGLE_BIN, SAFETENSORS = "pytorch_model.bin", "model.safetensors"


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def directory(tmp_path, tokenizer_model):
    """A complete model directory that a test may damage."""
    return copy_compact(tmp_path / "model", tokenizer_model)


@pytest.fixture(scope="module")
def original():
    return stock(COMPACT)


def stock(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, **{"dtype": torch.float32, **options})


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def all_weights(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for shard in SHARDS for k, v in torch.load(directory / shard, weights_only=True).items()}


def stored_names(file: Path) -> set[str]:
    with safe_open(file, "pt") as content:
        return set(content.keys())


def as_single_bin(directory: Path) -> None:
    torch.save(all_weights(directory), directory / SINGLE_BIN)
    for name in (INDEX, *SHARDS):
        (directory / name).unlink()


def as_safetensors(directory: Path, **options) -> None:
    """Only safetensors, as `save_pretrained` writes them."""
    model = stock(directory)
    for name in (INDEX, *SHARDS):
        (directory / name).unlink()
    model.save_pretrained(directory, **options)


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_stock_auto_classes_know_the_family(directory):
    assert type(AutoConfig.from_pretrained(directory)) is CharacterGLMConfig
    assert type(AutoTokenizer.from_pretrained(directory)) is ChatGLMTokenizer
    model = stock(directory)
    assert type(model) is CharacterGLMForCausalLM
    assert model.num_parameters() == sum(
        tensor.numel() for name, tensor in all_weights(COMPACT).items() if not name.endswith("inv_freq")
    )


LAYOUTS = {
    "single bin": as_single_bin,
    "single safetensors": as_safetensors,
    "sharded safetensors": lambda directory: as_safetensors(directory, max_shard_size="100KB"),
    "native names": lambda directory: as_safetensors(directory, save_original_format=False),
    "native names, sharded": lambda directory: as_safetensors(
        directory, save_original_format=False, max_shard_size="100KB"
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_model(directory, original, layout):
    LAYOUTS[layout](directory)
    index = directory / "model.safetensors.index.json"
    assert index.exists() == ("sharded" in layout)
    assert torch.equal(logits(stock(directory)), logits(original))
    model, tokenizer = helpers.load(directory, dtype="float32")
    assert not model.training
    assert torch.equal(logits(model), logits(original))
    assert type(tokenizer) is ChatGLMTokenizer


def test_safetensors_are_preferred_to_bin(directory, original):
    """As transformers does; the check of the files looks at the same ones."""
    stock(directory).save_pretrained(directory)
    (directory / SHARDS[0]).write_bytes(b"damaged, but not used")
    assert torch.equal(logits(stock(directory)), logits(original))


def test_save_pretrained_writes_the_original_names(original, tmp_path):
    original.save_pretrained(tmp_path)
    expected = {name for name in all_weights(COMPACT) if not name.endswith("inv_freq")}
    assert stored_names(tmp_path / SAFETENSORS) == expected
    for name, tensor in load_file(tmp_path / SAFETENSORS).items():
        assert torch.equal(tensor, all_weights(COMPACT)[name].float()), name


def test_save_pretrained_can_write_native_names(original, tmp_path):
    original.save_pretrained(tmp_path, save_original_format=False)
    assert stored_names(tmp_path / SAFETENSORS) == set(original.state_dict())


def test_saved_config_does_not_point_to_remote_code(original, tmp_path):
    original.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "auto_map" in json.loads((COMPACT / "config.json").read_text(encoding="utf-8"))
    assert saved["model_type"] == "chatglm" and "auto_map" not in saved


def test_save_and_reload_twice_and_in_half_precision(directory, tmp_path):
    first = stock(directory, dtype=torch.bfloat16)
    first.save_pretrained(tmp_path / "once")
    once = stock(tmp_path / "once", dtype="auto")
    once.save_pretrained(tmp_path / "twice")
    twice = stock(tmp_path / "twice", dtype="auto")
    assert once.dtype == twice.dtype == torch.bfloat16
    assert torch.equal(logits(first), logits(twice))


def test_load_state_dict_takes_both_layouts(original):
    """`Trainer` resumes this way with strict=False: with unknown names every weight would stay as it is."""
    for weights in (all_weights(COMPACT), original.state_dict()):
        fresh = CharacterGLMForCausalLM(original.config)
        assert not torch.equal(logits(fresh), logits(original))
        result = fresh.load_state_dict(weights, strict=False)
        assert not result.missing_keys and not result.unexpected_keys
        assert torch.equal(logits(fresh), logits(original))


# --- config ----------------------------------------------------------------------------------------------------------


def configured(directory: Path, **settings) -> Path:
    edit_json(directory / "config.json", lambda config: config.update(settings))
    return directory


def test_dtype_auto_is_that_of_the_config(directory):
    assert stock(directory, dtype="auto").dtype == torch.float16
    assert stock(configured(directory, torch_dtype="bfloat16"), dtype="auto").dtype == torch.bfloat16


GLM_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
)


@pytest.mark.parametrize(("ratio", "theta"), [(None, 1e4), (1, 1e4), (2, 2e4), (0.5, 5e3), (50.0, 5e5)])
def test_rope_ratio_scales_the_rotary_base(directory, original, ratio, theta):
    model = stock(configured(directory, rope_ratio=ratio))
    rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5}
    same = {name: getattr(original.config, name) for name in GLM_FIELDS}
    reference = GlmForCausalLM(GlmConfig(**same, pad_token_id=0, rope_parameters=rope))
    reference.load_state_dict(original.state_dict())
    assert torch.equal(logits(model), logits(reference))
    assert torch.equal(logits(model), logits(original)) == (theta == 1e4)


@pytest.mark.parametrize("stored", [True, False], ids=["output layer stored", "output layer left out"])
def test_tied_embeddings(directory, tmp_path, stored):
    """With tied embeddings the output layer is the embedding, whether the files repeat it or not."""

    def change(weights: dict) -> None:
        if OUTPUT in weights:
            weights.update({OUTPUT: all_weights(COMPACT)[EMBEDDING]})
            if not stored:
                del weights[OUTPUT]

    edit_weights(directory, change)
    model = stock(configured(directory, tie_word_embeddings=True))
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(stock(tmp_path / "saved")), logits(model))


def test_rope_ratio_survives_save_and_reload(directory, tmp_path):
    model = stock(configured(directory, rope_ratio=8))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(stock(tmp_path / "saved")), logits(model))


@pytest.mark.parametrize("ratio", ["2", 0, -1, True])
def test_senseless_rope_ratio_is_refused(directory, ratio):
    with pytest.raises(UnsupportedConfigError, match="rope_ratio"):
        AutoConfig.from_pretrained(configured(directory, rope_ratio=ratio))


def grouped(directory: Path, groups: int, copies: int, **settings) -> Path:
    """The same function with more key-value heads: the first `groups` heads, each written down `copies` times."""

    def change(weights: dict) -> None:
        for name in weights:
            if ".query_key_value." in name:
                query, *kv = weights[name].split([48, 24, 24])
                heads = [part.unflatten(0, (2, 12))[:groups].repeat_interleave(copies, 0).flatten(0, 1) for part in kv]
                weights[name] = torch.cat([query, *heads])

    edit_weights(directory, change)
    return configured(directory, multi_query_group_num=groups * copies, **settings)


@pytest.mark.parametrize(("groups", "copies"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2)])
def test_group_counts(tmp_path, groups, copies):
    """Heads that share a group see the same keys: copying a group must not change the result."""
    few = stock(grouped(copy_compact(tmp_path / "few"), groups, 1))
    many = stock(grouped(copy_compact(tmp_path / "many"), groups, copies))
    assert many.config.num_key_value_heads == groups * copies
    torch.testing.assert_close(logits(many), logits(few), rtol=0, atol=1e-5)
    many.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(stock(tmp_path / "saved")), logits(many))


def test_one_group_is_not_two(tmp_path, original):
    assert not torch.allclose(logits(stock(grouped(copy_compact(tmp_path / "one"), 1, 1))), logits(original), atol=0.1)


def test_without_multi_query_attention_every_head_has_its_keys(tmp_path, original):
    directory = grouped(copy_compact(tmp_path / "all"), 2, 2, multi_query_attention=False)
    configured(directory, multi_query_group_num=1)  # means nothing then
    model = stock(directory)
    assert model.config.num_key_value_heads == model.config.num_attention_heads == 4
    torch.testing.assert_close(logits(model), logits(original), rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(stock(tmp_path / "saved")), logits(model))


ORIGINAL_NAMES = {
    "num_layers": 2,
    "padded_vocab_size": 512,
    "ffn_hidden_size": 64,
    "kv_channels": 12,
    "multi_query_group_num": 2,
    "seq_length": 32768,
    "layernorm_epsilon": 1e-5,
    "add_qkv_bias": True,
}


def test_original_config_names_can_be_read_and_written_after_save_and_reload(original, tmp_path):
    original.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in ORIGINAL_NAMES} == ORIGINAL_NAMES
    config.num_layers = 1
    assert config.num_hidden_layers == 1
    config.num_hidden_layers = 2
    assert config.num_layers == 2


VIOLATIONS = {
    "rmsnorm": False,
    "post_layer_norm": False,
    "add_bias_linear": True,
    "apply_residual_connection_post_layernorm": True,
    "fp32_residual_connection": True,
    "original_rope": False,
    "hidden_dropout": 0.1,
    "pre_seq_len": 128,
    "prefix_projection": True,
    "quantization_bit": 4,
    "interleaved_qkv": True,
}


def test_every_required_setting_has_a_violation():
    assert VIOLATIONS.keys() == REQUIRED_SETTINGS.keys()


@pytest.mark.parametrize("name", VIOLATIONS)
def test_unsupported_setting_is_refused(directory, name):
    configured(directory, **{name: VIOLATIONS[name]})
    for attempt in (AutoConfig.from_pretrained, stock, helpers.load):
        with pytest.raises(UnsupportedConfigError, match=rf"{name}=.*\[unsupported setting\]"):
            attempt(directory)


@pytest.mark.parametrize("name", REQUIRED_SETTINGS)
def test_required_setting_may_be_absent_null_or_as_required(directory, original, name):
    edit_json(directory / "config.json", lambda config: config.pop(name, None))
    assert torch.equal(logits(stock(directory)), logits(original))
    for value in (None, REQUIRED_SETTINGS[name]):
        assert torch.equal(logits(stock(configured(directory, **{name: value}))), logits(original))


# --- damage ----------------------------------------------------------------------------------------------------------


def rewrite(name: str, change):
    def damage(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(change(content))

    return damage


def remove(name: str):
    return lambda directory: (directory / name).unlink()


def write(name: str, content: bytes):
    return lambda directory: (directory / name).write_bytes(content)


def drop_weight(name: str, from_index: bool):
    def damage(directory: Path) -> None:
        edit_weights(directory, lambda weights: weights.pop(name, None))
        if from_index:
            edit_json(directory / INDEX, lambda index: index["weight_map"].pop(name))

    return damage


def change_weight(name: str, change):
    def damage(directory: Path) -> None:
        edit_weights(
            directory, lambda weights: weights.update({name: change(weights[name])} if name in weights else {})
        )

    return damage


def add_weight(directory: Path) -> None:
    def change(weights: dict) -> None:
        if OUTPUT in weights:
            weights["transformer.prefix_encoder.embedding.weight"] = torch.zeros(2, 3)

    edit_weights(directory, change)


def in_safetensors(damage):
    def both(directory: Path) -> None:
        as_safetensors(directory)
        damage(directory)

    return both


def change_header(change):
    def damage(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        header = change(content[8 : 8 + length])
        return struct.pack("<Q", len(header)) + header + content[8 + length :]

    return rewrite(SAFETENSORS, damage)


def cut(name: str, where) -> object:
    return rewrite(name, lambda content: content[: where(len(content))])


CUTS = {
    "0 bytes": lambda size: 0,
    "1 byte": lambda size: 1,
    "100 bytes": lambda size: 100,
    "half": lambda size: size // 2,
    "99%": lambda size: size * 99 // 100,
    "all but one byte": lambda size: size - 1,
}
TRUNCATED = r"\[truncated or corrupt\]"
# What is done to the directory, and what the message must name.
DAMAGES = {
    "first shard missing": (remove(SHARDS[0]), SHARDS[0] + r" \[missing shard\]"),
    "second shard missing": (remove(SHARDS[1]), SHARDS[1] + r" \[missing shard\]"),
    **{f"first shard cut: {k}": (cut(SHARDS[0], where), f"{SHARDS[0]}.*{TRUNCATED}") for k, where in CUTS.items()},
    **{f"second shard cut: {k}": (cut(SHARDS[1], where), f"{SHARDS[1]}.*{TRUNCATED}") for k, where in CUTS.items()},
    **{
        f"safetensors cut: {k}": (in_safetensors(cut(SAFETENSORS, where)), f"{SAFETENSORS}.*{TRUNCATED}")
        for k, where in CUTS.items()
    },
    "shard with a zero tail": (
        rewrite(SHARDS[1], lambda content: content[: len(content) // 2].ljust(len(content), b"\0")),
        f"{SHARDS[1]}.*{TRUNCATED}",
    ),
    "shard is a web page": (write(SHARDS[1], b"<html>404</html>"), f"{SHARDS[1]}.*{TRUNCATED}"),
    "shard with a damaged pickle": (
        rewrite(SHARDS[1], lambda content: content[:80] + b"\xff" * 300 + content[380:]),
        f"{SHARDS[1]}.*unsafe pickle refused",
    ),
    "shard is a list": (
        lambda directory: torch.save([torch.ones(2)], directory / SHARDS[1]),
        f"{SHARDS[1]}.*unsafe pickle refused",
    ),
    "safetensors header is not JSON": (in_safetensors(change_header(lambda h: b"x" * len(h))), TRUNCATED),
    "safetensors header is a list": (in_safetensors(change_header(lambda h: b"[]".ljust(len(h)))), TRUNCATED),
    "safetensors entry without offsets": (
        in_safetensors(change_header(lambda h: h.replace(b"data_offsets", b"data_0ffsets"))),
        TRUNCATED,
    ),
    "weight missing from index and shard": (
        drop_weight(QKV_BIAS, True),
        r"\[missing keys\].*layers\.1\.self_attn\.k_proj\.bias",
    ),
    "weight missing from the shard only": (drop_weight(OUTPUT, False), r"\[missing keys\].*lm_head"),
    "norm missing": (
        drop_weight("transformer.encoder.final_layernorm.weight", True),
        r"\[missing keys\].*model\.norm",
    ),
    "weight nobody knows": (add_weight, r"\[unexpected keys\].*transformer\.prefix_encoder\.embedding\.weight"),
    "qkv weight of the wrong shape": (
        change_weight(QKV_WEIGHT, lambda w: w[:-1].clone()),
        r"\[wrong shape\].*query_key_value",
    ),
    "qkv bias of the wrong shape": (
        change_weight(QKV_BIAS, lambda w: torch.cat([w, w])),
        r"\[wrong shape\].*query_key_value",
    ),
    "embedding of the wrong shape": (
        change_weight(EMBEDDING, lambda w: w[:500].clone()),
        r"\[wrong shape\].*embed_tokens.*\(500, 48\).*\(512, 48\)",
    ),
    "norm of the wrong shape": (
        change_weight(f"{LAYER}.input_layernorm.weight", lambda w: w[:-1].clone()),
        r"\[wrong shape\].*input_layernorm\.weight.*\(47,\).*\(48,\)",
    ),
    "transposed weight": (
        change_weight(f"{LAYER}.mlp.dense_4h_to_h.weight", lambda w: w.T.contiguous()),
        r"\[wrong shape\].*down_proj\.weight.*\(64, 48\).*\(48, 64\)",
    ),
    "a layer more in config.json": (lambda d: configured(d, num_layers=3), r"\[missing keys\].*layers\.2\."),
    "a layer less in config.json": (lambda d: configured(d, num_layers=1), r"\[unexpected keys\].*layers\.1\."),
    "other group count in config.json": (
        lambda d: configured(d, multi_query_group_num=1),
        r"\[wrong shape\].*query_key_value",
    ),
    "index missing": (remove(INDEX), rf"\[no weight files\].*{INDEX}"),
    "index is not JSON": (write(INDEX, b'{"weight_map": '), rf"{INDEX}.*\[invalid JSON\]"),
    "index without weight_map": (write(INDEX, b"{}"), rf"{INDEX}.*\[invalid index\]"),
    "index with an empty weight_map": (write(INDEX, b'{"weight_map": {}}'), rf"{INDEX}.*\[invalid index\]"),
    "index with numbers": (write(INDEX, b'{"weight_map": {"a": 5}}'), rf"{INDEX}.*a.*5.*\[invalid index\]"),
    "index that points outside": (
        lambda d: edit_json(d / INDEX, lambda i: i["weight_map"].update({OUTPUT: f"../{d.name}/{SHARDS[1]}"})),
        rf"{INDEX}.*{OUTPUT}.*\[invalid index\]",
    ),
}


def assert_one_clear_error(attempt, directory: Path, pattern: str, capfd) -> None:
    with pytest.raises(CheckpointError, match=pattern) as caught:
        attempt(directory)
    message = str(caught.value)
    assert str(directory) in message and "\n" not in message
    assert "newly initialized" not in "".join(capfd.readouterr())  # nothing was made up on the way


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_directory_is_refused(directory, damage, capfd):
    change, pattern = DAMAGES[damage]
    change(directory)
    for attempt in (helpers.load, stock, CharacterGLMForCausalLM.from_pretrained):
        assert_one_clear_error(attempt, directory, pattern, capfd)


def replace_config(content: bytes):
    return write("config.json", content)


CONFIG_DAMAGES = {
    "config.json missing": (remove("config.json"), r"config\.json \[missing file\]"),
    "config.json cut": (cut("config.json", lambda size: size // 2), r"config\.json.*\[invalid JSON\]"),
    "config.json empty": (replace_config(b""), r"config\.json.*\[invalid JSON\]"),
    "config.json binary": (replace_config(b"\xff\xfe\0"), r"config\.json.*\[invalid JSON\]"),
    "config.json a list": (replace_config(b"[1]"), r"config\.json.*\[not a JSON object\]"),
    "no model_type": (replace_config(b"{}"), r"\[not a CharacterGLM directory\].*model_type=None"),
    "other model_type": (replace_config(b'{"model_type": "x"}'), r"\[not a CharacterGLM directory\].*'x'"),
    "empty directory": (lambda d: [file.unlink() for file in d.iterdir()], r"\[empty directory\]"),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGES)
def test_directory_without_a_usable_config_is_refused(directory, damage, capfd):
    change, pattern = CONFIG_DAMAGES[damage]
    change(directory)
    for attempt in (helpers.load, helpers.resolve_model, CharacterGLMForCausalLM.from_pretrained):
        assert_one_clear_error(attempt, directory, pattern, capfd)
    # Without a model type the stock class cannot know that the directory is ours: the error is transformers' own.
    with pytest.raises((OSError, ValueError)):
        stock(directory)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_damaged_settings_are_refused(directory, name):
    (directory / name).write_text('{"tokenizer_class": ')
    with pytest.raises(CheckpointError, match=rf"{name}.*\[invalid JSON\]"):
        helpers.load(directory)


def test_missing_tokenizer_is_refused_before_the_weights_are_read(directory, monkeypatch):
    (directory / "tokenizer.model").unlink()
    monkeypatch.setattr(CharacterGLMForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.model \[missing file\]"):
        helpers.load(directory)


def test_tokenizer_of_a_larger_model_is_refused(directory, tmp_path):
    def shrink(weights: dict) -> None:
        for name in {EMBEDDING, OUTPUT} & weights.keys():
            weights[name] = weights[name][:64].clone()

    edit_weights(directory, shrink)
    with pytest.raises(CheckpointError, match=r"\[tokenizer mismatch\]"):
        helpers.load(configured(directory, padded_vocab_size=64))


def test_file_instead_of_a_directory(directory, capfd):
    file = directory / SHARDS[0]
    for attempt in (helpers.load, helpers.resolve_model):
        assert_one_clear_error(attempt, file, r"\[unknown model\]", capfd)
    with pytest.raises(OSError, match=SHARDS[0]):
        stock(file)


def test_nothing_at_the_path(tmp_path, capfd):
    assert_one_clear_error(helpers.load, tmp_path / "nowhere", r"\[unknown model\]", capfd)


def test_wrong_shapes_cannot_be_waved_through(directory):
    change_weight(EMBEDDING, lambda w: w[:500].clone())(directory)
    with pytest.raises(CheckpointError, match="wrong shape"):
        stock(directory, ignore_mismatched_sizes=True)


def test_weights_missing_from_a_state_dict_are_refused(directory, original):
    """The way round the files: transformers itself has to report what it made up."""
    weights = all_weights(COMPACT)
    config = original.config
    complete = CharacterGLMForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
    assert torch.equal(logits(complete), logits(original))
    del weights[OUTPUT]
    with pytest.raises(CheckpointError, match=r"\[missing keys\].*lm_head\.weight"):
        CharacterGLMForCausalLM.from_pretrained(None, config=config, state_dict=weights)


# --- malice ----------------------------------------------------------------------------------------------------------


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


@pytest.fixture
def marker(tmp_path):
    """What a trap would leave behind; a trap is sprung by hand first, so that its absence means something."""
    return tmp_path / "trap-was-sprung"


def test_the_malicious_pickle_is_malicious(marker):
    pickle.loads(pickle.dumps(Malicious(marker)))
    assert marker.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "among the weights"])
@pytest.mark.parametrize("name", [SHARDS[0], SHARDS[1], SINGLE_BIN])
def test_malicious_pickle_is_refused(directory, marker, name, alone, zipped):
    if name == SINGLE_BIN:
        as_single_bin(directory)
    weights = {} if alone else torch.load(directory / name, weights_only=True)
    weights["trap"] = Malicious(marker)
    torch.save(weights, directory / name, _use_new_zipfile_serialization=zipped)
    expected = "unsafe pickle refused" if zipped else TRUNCATED
    for attempt in (helpers.load, stock):
        with pytest.raises(CheckpointError, match=f"{name}.*{expected}"):
            attempt(directory)
    assert not marker.exists()


def test_malicious_plain_pickle_is_refused(directory, marker):
    (directory / SHARDS[0]).write_bytes(pickle.dumps({"trap": Malicious(marker)}))
    for attempt in (helpers.load, stock):
        with pytest.raises(CheckpointError, match=SHARDS[0]):
            attempt(directory)
    assert not marker.exists()


TRAP_MODULES = {
    "configuration_chatglm": "ChatGLMConfig",
    "modeling_characterglm": "CharacterGLMForConditionalGeneration",
    "tokenization_chatglm": "ChatGLMTokenizer",
}


@pytest.fixture
def trapped(directory, marker):
    """The directory as the vendor ships it, with remote code that would leave a mark when imported."""
    for module, name in TRAP_MODULES.items():
        code = f"import os\nos.mkdir({str(marker)!r})\nclass {name}: pass\n"
        (directory / f"{module}.py").write_text(code, encoding="utf-8")
    auto_map = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    settings = {"tokenizer_class": "ChatGLMTokenizer", "auto_map": auto_map}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "modeling_characterglm" in (directory / "config.json").read_text(encoding="utf-8")
    return directory


@pytest.mark.parametrize("module", TRAP_MODULES)
def test_the_traps_are_traps(trapped, marker, module):
    exec(compile((trapped / f"{module}.py").read_text(encoding="utf-8"), module, "exec"), {})
    assert marker.exists()


def test_remote_code_is_not_touched(trapped, marker, original, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked whether to trust remote code"))
    assert type(AutoConfig.from_pretrained(trapped)) is CharacterGLMConfig
    assert type(AutoTokenizer.from_pretrained(trapped)) is ChatGLMTokenizer
    assert torch.equal(logits(stock(trapped)), logits(original))
    model, tokenizer = helpers.load(trapped, dtype="float32")
    assert torch.equal(logits(model), logits(original)) and type(tokenizer) is ChatGLMTokenizer
    assert not marker.exists()
    assert not any(name.rpartition(".")[2] in TRAP_MODULES for name in sys.modules)


# --- PEFT and Trainer ------------------------------------------------------------------------------------------------


def lora(model, seed: int = 0):
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, config)


@pytest.fixture
def adapted(directory, tmp_path):
    """A LoRA model after one training step, and the directory of its adapter."""
    model = lora(stock(directory))
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    return SimpleNamespace(model=model, before=before, directory=tmp_path / "adapter")


def test_one_step_moves_lora_b_and_nothing_of_the_base(adapted):
    for name, tensor in adapted.model.named_parameters():
        moved = not torch.equal(tensor, adapted.before[name])
        if "lora_B" in name:
            assert moved and tensor.abs().max() > 0, name
        elif "lora_A" not in name:
            assert not moved, name


def test_adapter_round_trip(directory, adapted, original):
    model, _ = helpers.load(directory, dtype="float32", adapter=adapted.directory)
    assert not any(module.training for module in model.modules())
    assert torch.equal(logits(model), logits(adapted.model))
    assert not torch.equal(logits(model), logits(original))


def damage_adapter(file: Path, change) -> None:
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


ADAPTER_DAMAGES = {
    "no config": (lambda d: (d / "adapter_config.json").unlink(), r"\[not an adapter directory\]"),
    "config is not JSON": (
        lambda d: (d / "adapter_config.json").write_text("{"),
        r"adapter_config\.json.*invalid JSON",
    ),
    "no weights": (
        lambda d: (d / "adapter_model.safetensors").unlink(),
        r"adapter_model\.safetensors.*\[missing shard\]",
    ),
    "weights cut": (cut("adapter_model.safetensors", lambda size: size // 2), TRUNCATED),
    "a weight missing": (
        lambda d: damage_adapter(d / "adapter_model.safetensors", lambda w: w.pop(min(w))),
        r"\[missing adapter keys\].*lora_A",
    ),
    "other rank": (
        lambda d: edit_json(d / "adapter_config.json", lambda config: config.update(r=8)),
        r"\[adapter does not fit\]",
    ),
    "for the fused attention of remote code": (
        lambda d: edit_json(
            d / "adapter_config.json", lambda config: config.update(target_modules=["query_key_value"])
        ),
        r"query_key_value.*\[adapter for the original code\]",
    ),
}


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("damage", ADAPTER_DAMAGES)
def test_damaged_adapter_is_refused(directory, adapted, damage):
    change, pattern = ADAPTER_DAMAGES[damage]
    change(adapted.directory)
    with pytest.raises(CheckpointError, match=pattern):
        helpers.load(directory, adapter=adapted.directory)


def test_malicious_adapter_is_refused(directory, adapted, marker):
    (adapted.directory / "adapter_model.safetensors").unlink()
    torch.save({"trap": Malicious(marker)}, adapted.directory / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin.*unsafe pickle refused"):
        helpers.load(directory, adapter=adapted.directory)
    assert not marker.exists()


def trainer(model, output_dir: Path, steps: int) -> Trainer:
    ids = torch.randint(3, 500, (8, 20), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])


def test_trainer_trains_saves_and_resumes(directory, tmp_path, original):
    model = stock(directory)
    first = trainer(model, tmp_path / "out", steps=2)
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert len(losses) == 2 and not torch.equal(logits(model), logits(original))
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert torch.equal(logits(stock(checkpoint)), logits(model))

    resumed = stock(directory)
    second = trainer(resumed, tmp_path / "out", steps=3)
    second.train(resume_from_checkpoint=str(checkpoint))
    straight = stock(directory)
    trainer(straight, tmp_path / "straight", steps=3).train()
    assert second.state.global_step == 3
    assert not torch.equal(logits(resumed), logits(model))
    torch.testing.assert_close(logits(resumed), logits(straight), rtol=0, atol=1e-4)


def test_trainer_trains_a_lora_model(directory, tmp_path):
    model = lora(stock(directory))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()  # with a frozen base this needs inputs that require gradients
    trainer(model, tmp_path / "out", steps=2).train()
    assert all(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    reloaded, _ = helpers.load(directory, dtype="float32", adapter=tmp_path / "out" / "checkpoint-2")
    assert torch.equal(logits(reloaded), logits(model))


# --- what load picks -------------------------------------------------------------------------------------------------

GPUS = {  # name: (memory in GiB, compute capability)
    "A800": (80, (8, 0)),
    "RTX 4090": (24, (8, 9)),
    "V100": (32, (7, 0)),
    "GTX 1660": (6, (7, 5)),
}


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine with these GPUs."""

    def pretend(*names: str, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(names))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=0: names[i])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: GPUS[names[i]][1])
        properties = lambda i=0: SimpleNamespace(total_memory=GPUS[names[i]][0] * 2**30)  # noqa: E731
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.fixture
def models(directory, monkeypatch):
    """Stand-ins for both shipped models; returns (6b, nano)."""
    large = copy_compact(directory.with_name("CharacterGLM-6B"))
    monkeypatch.setattr(loading, "NANO_DIR", directory)
    monkeypatch.setattr(loading, "find_downloaded", lambda: large)
    return large, directory


@pytest.mark.parametrize(
    ("gpus", "name", "dtype", "device", "reasons"),
    [
        (["A800"], "6b", torch.bfloat16, "auto", ["80 GiB", "A800", "原生支持 bfloat16"]),
        (["RTX 4090"], "6b", torch.bfloat16, "auto", ["24 GiB", "RTX 4090", "原生支持 bfloat16"]),
        (["V100"], "6b", torch.float16, "auto", ["32 GiB", "V100", "没有原生 bfloat16"]),
        (["GTX 1660"], "nano", torch.float16, "auto", ["只有 6 GiB", "GTX 1660", "没有原生 bfloat16"]),
        (["GTX 1660", "A800"], "6b", None, "auto", ["80 GiB"]),
        ([], "nano", torch.float32, "cpu", ["没有 CUDA GPU", "用 CPU", "float32"]),
    ],
    ids=lambda value: "+".join(value) or "no GPU" if isinstance(value, list) else "",
)
def test_what_auto_picks_and_why(models, machine, gpus, name, dtype, device, reasons):
    machine(*gpus)
    choice = helpers.choose("auto")
    assert helpers.pick_model("auto")[0] == name
    assert choice.path == helpers.resolve_model("auto") == models[name == "nano"]
    assert choice.device_map == device
    assert dtype is None or choice.dtype == dtype
    for reason in reasons:
        assert reason in str(choice), reason


def test_a_slow_gpu_beside_a_fast_one_decides_the_dtype(models, machine):
    """The model may be spread over all of them, and every one has to compute in the dtype."""
    machine("A800", "V100")
    assert helpers.choose("6b").dtype == torch.float16
    machine("A800", "RTX 4090")
    assert helpers.choose("6b").dtype == torch.bfloat16


def test_a_large_model_on_a_cpu_takes_half_the_memory(models, machine, monkeypatch):
    machine()
    monkeypatch.setattr(loading, "SMALL_CHECKPOINT_BYTES", 1000)
    choice = helpers.choose("6b")
    assert choice.dtype == torch.bfloat16 and "两倍内存" in str(choice)


def test_apple_gpu(models, machine):
    machine(mps=True)
    choice = helpers.choose("nano")
    assert (choice.device_map, choice.dtype) == ("mps", torch.float16)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}], ids=["name", "dict"])
def test_a_model_kept_on_the_cpu_of_a_gpu_machine(models, machine, device_map):
    machine("V100")
    choice = helpers.choose("nano", device_map=device_map)
    assert choice.device_map == device_map and choice.dtype == torch.float32
    assert "由你指定" in str(choice)


@pytest.mark.parametrize("device_map", [0, 1, "cuda:1", {"": 0}, {"": torch.device("cuda", 1)}, "balanced"], ids=str)
def test_a_gpu_by_its_number(models, machine, device_map):
    """0 is a GPU, not nothing."""
    machine("A800", "RTX 4090")
    choice = helpers.choose("nano", device_map=device_map)
    assert choice.device_map == device_map and choice.dtype == torch.bfloat16


NOT_HERE = [
    ("disk", "disk offload not supported"),
    ({"": "disk"}, "disk offload not supported"),
    ("gpu", "unknown device"),
    ("meta", "unknown device"),
    (1.5, "unknown device"),
    (-1, "unknown device"),
    ({"": "auto"}, "unknown device"),
    ("cuda", "no such device"),
    (0, "no such device"),
    ({"model": "cpu", "lm_head": "cuda:3"}, "no such device"),
]


@pytest.mark.parametrize(("device_map", "problem"), NOT_HERE, ids=str)
def test_a_device_that_is_not_here_is_refused(models, machine, device_map, problem):
    machine()
    with pytest.raises(HelpersError, match=rf"^[^\n]*\[{problem}\][^\n]*$"):
        helpers.load("nano", device_map=device_map)


@pytest.mark.parametrize("dtype", ["float16", torch.float16])
def test_a_given_dtype_is_taken(models, machine, dtype):
    machine()
    choice = helpers.choose("nano", dtype=dtype)
    assert choice.dtype == torch.float16 and "由你指定" in str(choice)


def test_load_does_what_choose_says(models, machine, caplog):
    machine()
    with caplog.at_level("INFO", logger="helpers.model.loading"):
        model, _ = helpers.load("nano", dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu"
    assert str(helpers.choose("nano", dtype="bfloat16")) in caplog.text


@pytest.mark.parametrize("model", ["7b", "CharacterGLM", "", "THUCoAI/CharacterGLM-6B"])
def test_unknown_model_is_refused(machine, model):
    machine()
    with pytest.raises(CheckpointError, match=r"\[unknown model\]"):
        helpers.resolve_model(model)


def test_6b_that_is_not_here_is_refused(machine, monkeypatch):
    machine("A800")
    monkeypatch.setattr(loading, "find_downloaded", lambda: None)
    for model in ("6b", "auto"):
        with pytest.raises(CheckpointError, match=r"\[model not downloaded\].*helpers download"):
            helpers.resolve_model(model)


@pytest.mark.parametrize("dtype", ["int8", "bf16", "", 16, None])
def test_unknown_dtype_is_refused(directory, dtype):
    with pytest.raises(HelpersError, match=r"\[unknown dtype\]"):
        helpers.load(directory, dtype=dtype)


@pytest.mark.parametrize("quantization", ["int4", "fp8", "", 4])
def test_unknown_quantization_is_refused(directory, quantization):
    with pytest.raises(HelpersError, match=r"\[unknown quantization\]"):
        helpers.load(directory, quantization=quantization)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantization_without_bitsandbytes_is_refused(directory, monkeypatch, quantization):
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    with pytest.raises(HelpersError, match=r"\[bitsandbytes not installed\].*pip install bitsandbytes"):
        helpers.load(directory, quantization=quantization)


# --- memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, torch, helpers
from support.memory import PeakMemory
helpers.load("nano")  # the libraries' share
for dtype in ("bfloat16", "float32"):
    with PeakMemory() as peak:
        model, _ = helpers.load(sys.argv[1], dtype=dtype)
        sum(parameter.sum() for parameter in model.parameters())  # looks at every page
    weights = model.get_memory_footprint()
    print(peak.resident / weights, peak.allocated / weights)
    del model
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure memory")
def test_bin_is_loaded_without_a_second_copy_in_memory(tmp_path, record_property):
    """Peak memory over the weights' own: in the dtype of the shards, and converted, when they are beside the model.

    Resident memory counts what is mapped from the files, allocated memory does not: the kernel can drop the former.
    """
    config = CharacterGLMConfig(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        head_dim=64,
    )
    write_random_checkpoint(tmp_path / "model", config)
    size = sum((tmp_path / "model" / shard).stat().st_size for shard in SHARDS)
    assert size > 100e6
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'benchmarks'}", "OMP_NUM_THREADS": "1"},
    )
    (resident, kept), (_, converted) = [map(float, line.split()) for line in run.stdout.splitlines()]
    record_property("peak_over_weights", (round(resident, 2), round(converted, 2)))
    assert 0.9 < resident < 1.15  # below 0.9 the weights were not really read
    assert kept < 0.1  # in their own dtype they stay in the files
    assert 0.9 < converted < 1.15  # with all shards beside the model it is 1.3


def test_loading_says_nothing_that_is_not_ours(run_command):
    done = run_command("-c", "import helpers; helpers.load('nano')")
    said = [line for line in done.stderr.splitlines() if line.strip() and "Loading weights" not in line]
    assert done.returncode == 0 and said == [] and done.stdout == ""
