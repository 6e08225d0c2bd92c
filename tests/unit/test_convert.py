"""The safetensors copy: bit for bit the same model, complete or not there at all, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import COMPACT, INDEX, NANO, REPOSITORY, SHARDS, copy_compact, edit_json, edit_weights, train_tokenizer
from safetensors.torch import load_file
from transformers import modeling_utils
from typer.testing import CliRunner
from write_6b_shape import write_random_checkpoint

import helpers
from helpers import paths
from helpers.chat.generation import model_defaults
from helpers.cli.app import app
from helpers.errors import CheckpointError, HelpersError
from helpers.export import safetensors_copy as convert
from helpers.export.safetensors_copy import convert_checkpoint
from helpers.model.modeling import CharacterGLMConfig, CharacterGLMForCausalLM

IDS = torch.arange(5, 60)[None]
OUTPUT = "transformer.output_layer.weight"


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def source(tmp_path, tokenizer_model):
    """A model directory as the vendor ships it: two shards, remote code and settings that point to it."""
    directory = copy_compact(tmp_path / "source", tokenizer_model)
    (directory / "modeling_characterglm.py").write_text("raise SystemExit")
    (directory / "MODEL_LICENSE").write_text("research only")
    settings = {"tokenizer_class": "ChatGLMTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_chatglm.X", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "auto_map" in (directory / "config.json").read_text()
    return directory


@pytest.fixture
def several_files(monkeypatch):
    monkeypatch.setattr(convert, "SHARD_SIZE", "50KB")


def weights(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    files = files or sorted(directory.glob("*.bin"))
    stored = [load_file(f) if f.suffix == ".safetensors" else torch.load(f, weights_only=True) for f in files]
    # The rotary table is recomputed in float32; the stored one is not used.
    return {k: tensor for part in stored for k, tensor in part.items() if not k.endswith("inv_freq")}


@torch.no_grad()
def logits(directory: Path) -> torch.Tensor:
    return helpers.load(directory, dtype="float32")[0](input_ids=IDS).logits


def content(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def assert_same_weights(copy: Path, original: Path) -> None:
    copied, expected = weights(copy), weights(original)
    assert copied.keys() == expected.keys()
    for name, tensor in expected.items():
        assert copied[name].dtype == tensor.dtype and torch.equal(copied[name], tensor), name


# --- the copy --------------------------------------------------------------------------------------------------------


def test_copy_of_nano_is_the_same_model(tmp_path):
    copy = convert_checkpoint("nano", tmp_path / "copy")
    assert {file.name for file in copy.iterdir()} == {
        *("model.safetensors", "config.json", "generation_config.json"),
        *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"),
    }
    assert_same_weights(copy, NANO)
    assert torch.equal(logits(copy), logits(NANO))
    assert list(tmp_path.iterdir()) == [copy]


def test_copy_in_several_files_without_remote_code(source, tmp_path, several_files):
    copy = convert_checkpoint(source, tmp_path / "copy")
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and index["weight_map"].keys() == weights(source).keys()
    assert_same_weights(copy, source)
    assert torch.equal(logits(copy), logits(source))
    assert not list(copy.glob("*.py"))
    assert not any(b"auto_map" in text for name, text in content(copy).items() if name.endswith(".json"))
    for name in ("tokenizer.model", "MODEL_LICENSE"):
        assert (copy / name).read_bytes() == (source / name).read_bytes()
    assert "auto_map" in (source / "config.json").read_text(), "the original stays as it is"
    defaults = [model_defaults(helpers.load(directory)[0]) for directory in (source, copy)]
    assert defaults == [{}, {}], "the vendor's, in both"


def test_tied_embeddings_are_written_once(source, tmp_path):
    edit_weights(source, lambda stored: stored.pop(OUTPUT, None))
    edit_json(source / INDEX, lambda index: index["weight_map"].pop(OUTPUT))
    edit_json(source / "config.json", lambda config: config.update(tie_word_embeddings=True))
    assert_same_weights(convert_checkpoint(source, tmp_path / "copy"), source)
    assert torch.equal(logits(tmp_path / "copy"), logits(source))


def test_nan_is_copied_too(source, tmp_path):
    edit_weights(source, lambda stored: stored.update({OUTPUT: stored[OUTPUT] * torch.nan} if OUTPUT in stored else {}))
    assert weights(convert_checkpoint(source, tmp_path / "copy"))[OUTPUT].isnan().all()


def test_a_finished_copy_is_left_as_it_is(source, tmp_path, several_files, capsys):
    copy = convert_checkpoint(source, tmp_path / "copy")
    times = {file: file.stat().st_mtime_ns for file in copy.iterdir()}
    capsys.readouterr()
    assert convert_checkpoint(source, copy) == copy
    out = capsys.readouterr().out
    assert "[already converted]" in out and out.count("\n") == 1
    assert {file: file.stat().st_mtime_ns for file in copy.iterdir()} == times


def test_safetensors_need_no_conversion(tmp_path, capsys):
    copy = convert_checkpoint("nano", tmp_path / "copy")
    assert convert_checkpoint(copy, tmp_path / "second") == copy
    assert "[already safetensors]" in capsys.readouterr().out
    assert not (tmp_path / "second").exists()


# --- refused ---------------------------------------------------------------------------------------------------------


def another_file(copy: Path) -> None:
    shutil.rmtree(copy)
    copy.mkdir()
    (copy / "diary.txt").write_text("mine")


def flip_a_bit(copy: Path) -> None:
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


IN_USE = {
    "another file": another_file,
    "a bit differs": flip_a_bit,
    "a file is missing": lambda copy: (copy / "tokenizer.model").unlink(),
    "weights are missing": lambda copy: (copy / "model.safetensors").unlink(),
    "settings of another model": lambda copy: (copy / "config.json").write_text("{}"),
}


@pytest.mark.parametrize("what", IN_USE)
def test_a_directory_in_use_is_not_touched(source, tmp_path, what):
    copy = convert_checkpoint(source, tmp_path / "copy")
    IN_USE[what](copy)
    before = content(tmp_path)
    with pytest.raises(HelpersError, match=r"\[target not empty\]"):
        convert_checkpoint(source, copy)
    assert content(tmp_path) == before


def drop_a_weight(source: Path) -> None:
    edit_weights(source, lambda stored: stored.pop(OUTPUT, None))


BAD_SOURCES = {
    "empty": (lambda source: [file.unlink() for file in source.iterdir()], r"\[empty directory\]"),
    "not CharacterGLM": (lambda source: (source / "config.json").write_text("{}"), r"\[not a CharacterGLM directory\]"),
    "shard missing": (lambda source: (source / SHARDS[1]).unlink(), r"\[missing shard\]"),
    "weight missing": (drop_a_weight, r"\[missing keys\]"),
    "no tokenizer": (lambda source: (source / "tokenizer.model").unlink(), r"tokenizer\.model \[missing file\]"),
    "not only tensors": (
        lambda source: torch.save({"trap": print}, source / SHARDS[0]),
        r"\[unsafe pickle refused\]",
    ),
    "text among the tensors": (
        lambda source: edit_weights(source, lambda stored: stored.update(note="text")),
        r"\[unsafe pickle refused\]",
    ),
}


@pytest.mark.parametrize("damage", BAD_SOURCES)
def test_a_bad_model_is_refused(source, tmp_path, damage):
    change, pattern = BAD_SOURCES[damage]
    change(source)
    with pytest.raises(CheckpointError, match=pattern):
        convert_checkpoint(source, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == [source]


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
            convert_checkpoint(source, target)
        assert content(tmp_path) == before


# --- disks -----------------------------------------------------------------------------------------------------------


def test_a_disk_too_small_is_refused_before_anything_is_written(small_disk):
    with pytest.raises(HelpersError, match=r"\[not enough disk space\]"):
        convert_checkpoint("nano", small_disk / "copy")
    assert not any(small_disk.iterdir())


def test_a_disk_that_fills_up_on_the_way(small_disk, monkeypatch):
    monkeypatch.setattr(paths, "check_disk_space", lambda *_: None)  # it looked large enough before
    monkeypatch.setattr(convert, "SHARD_SIZE", "3MB")
    with pytest.raises(HelpersError, match=r"\[disk full\]"):
        convert_checkpoint("nano", small_disk / "copy")
    assert not any(small_disk.iterdir())
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert torch.equal(logits(convert_checkpoint("nano", small_disk / "copy")), logits(NANO))


def test_a_read_only_disk(small_disk, monkeypatch):
    monkeypatch.setattr(paths, "check_disk_space", lambda *_: None)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(HelpersError, match=r"\[cannot write\]"):
        convert_checkpoint("nano", small_disk / "copy")


# --- interrupted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exists", [True, False], ids=["into an empty directory", "into a new one"])
def test_interrupted_with_ctrl_c(source, tmp_path, monkeypatch, several_files, exists, capsys):
    target = tmp_path / "copy"
    if exists:
        target.mkdir()
    before = sorted(tmp_path.iterdir())
    written = []

    def interrupted(*arguments, **options):
        written.append(arguments)
        if len(written) == 2:
            raise KeyboardInterrupt
        save_file(*arguments, **options)

    save_file = modeling_utils.safe_save_file
    monkeypatch.setattr(modeling_utils, "safe_save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, target)
    assert sorted(tmp_path.iterdir()) == before and "[interrupted]" in capsys.readouterr().out
    monkeypatch.setattr(modeling_utils, "safe_save_file", save_file)
    assert_same_weights(convert_checkpoint(source, target), source)


KILLED = """
import os, signal, sys
from transformers import modeling_utils
from helpers.export import safetensors_copy as convert
convert.SHARD_SIZE = "50KB"
save_file, written = modeling_utils.safe_save_file, []
def killed(*arguments, **options):
    written.append(arguments)
    if len(written) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    save_file(*arguments, **options)
modeling_utils.safe_save_file = killed
convert.convert_checkpoint(*sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_midway_leaves_nothing_that_looks_complete(source, tmp_path):
    target = tmp_path / "copy"
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(target)], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}
    )
    assert run.returncode == -signal.SIGKILL
    (left,) = set(tmp_path.iterdir()) - {source}
    assert left.name.endswith(".partial") and any(left.rglob("*.safetensors"))
    for directory in (target, left, left / "copy"):
        with pytest.raises(CheckpointError):
            helpers.resolve_model(directory)
    assert_same_weights(convert_checkpoint(source, target), source)


def test_a_copy_that_differs_is_thrown_away(source, tmp_path, monkeypatch):
    def damaging(model, directory, **options):
        save_pretrained(model, directory, **options)
        flip_a_bit(directory)

    save_pretrained = CharacterGLMForCausalLM.save_pretrained
    monkeypatch.setattr(CharacterGLMForCausalLM, "save_pretrained", damaging)
    with pytest.raises(HelpersError, match=r"\[copy differs\]"):
        convert_checkpoint(source, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == [source]


# --- memory, command line --------------------------------------------------------------------------------------------

MEASURE = """
import sys
from helpers.export import safetensors_copy as convert
from support.memory import PeakMemory
convert.SHARD_SIZE = "10MB"
convert.convert_checkpoint("nano", sys.argv[2] + " warm-up")
with PeakMemory() as peak:
    convert.convert_checkpoint(*sys.argv[1:])
print(peak.resident, peak.allocated)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure memory")
@pytest.mark.slow
def test_the_weights_stay_in_their_files(tmp_path):
    """Of 115 MB of weights the 19 MB of q, k and v are put together again; the others stay in their files, mapped."""
    config = CharacterGLMConfig(
        vocab_size=4096,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        head_dim=64,
    )
    write_random_checkpoint(tmp_path / "model", config)
    assert sum((tmp_path / "model" / shard).stat().st_size for shard in SHARDS) > 100e6
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "model"), str(tmp_path / "copy")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'benchmarks'}", "OMP_NUM_THREADS": "1"},
    )
    resident, allocated = map(int, run.stdout.splitlines()[-1].split())
    assert allocated < 40e6


def test_command_line(source, tmp_path):
    runner = CliRunner()
    done = runner.invoke(app, ["convert", "--model", str(source), str(tmp_path / "copy")])
    assert done.exit_code == 0 and "[converted and compared]" in done.output
    again = runner.invoke(app, ["convert", "--model", str(tmp_path / "copy"), str(tmp_path / "third")])
    assert again.exit_code == 0 and "[already safetensors]" in again.output
    assert runner.invoke(app, ["convert"]).exit_code == 2
    refused = runner.invoke(app, ["convert", "--model", "nano", str(source)])
    assert isinstance(refused.exception, HelpersError)  # main() prints it as one line


def test_convert_6b_takes_the_downloaded_one(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.model.loading.find_downloaded", lambda: NANO)
    assert_same_weights(convert_checkpoint("6b", tmp_path / "copy"), NANO)
    monkeypatch.setattr("helpers.model.loading.find_downloaded", lambda: None)
    with pytest.raises(CheckpointError, match=r"\[model not downloaded\]"):
        convert_checkpoint("6b", tmp_path / "other")


def test_golden_logits_through_the_copy(source, tmp_path):
    """The copy against what the original modelling code computed."""
    import numpy as np

    golden = np.load(COMPACT / "golden.npz")
    length = max(int(name.removeprefix("input_ids_")) for name in golden if name.startswith("input_ids_"))
    model, _ = helpers.load(convert_checkpoint(source, tmp_path / "copy"), dtype="float32")
    with torch.no_grad():
        found = model(input_ids=torch.from_numpy(golden[f"input_ids_{length}"])[None]).logits[0, -1]
    assert torch.allclose(found, torch.from_numpy(golden[f"last_logits_{length}"]), rtol=0, atol=1e-5)
