"""Where the 6B model is looked for, and its download, with small stand-ins for the model and for ModelScope."""

import fnmatch
import inspect
import shutil
from collections import namedtuple
from pathlib import Path

import modelscope
import pytest

import helpers
from helpers import download
from helpers.errors import CheckpointError, HelpersError

CHECKPOINT = Path(__file__).parent.parent / "golden" / "compact"
SHARD = "pytorch_model-00001-of-00002.bin"
NAME = "CharacterGLM-6B"
SNAPSHOT = "models/THUCoAI--CharacterGLM-6B/snapshots/master"
DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine of its own: home, working directory, AutoDL data disk (absent until made), 100 GB free."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MODELSCOPE_CACHE", raising=False)
    monkeypatch.setattr(download, "AUTODL_DATA_DISK", tmp_path / "autodl-tmp")
    set_free_disk(monkeypatch, 100e9)
    return tmp_path


def set_free_disk(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**12, 10**12 - int(free), int(free)))


def put_model(directory):
    """A complete checkpoint in `directory`, with a file in the tokenizer's place."""
    shutil.copytree(CHECKPOINT, directory, dirs_exist_ok=True)
    (directory / "tokenizer.model").write_bytes(b"pieces")
    return directory


@pytest.fixture
def modelscope_calls(monkeypatch):
    """Stand in for `modelscope.snapshot_download`. Arguments the installed version does not know are an error."""
    calls, signature = [], inspect.signature(modelscope.snapshot_download)

    def stand_in(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs).arguments
        calls.append(arguments)
        stand_in.work(Path(arguments["local_dir"]))
        return arguments["local_dir"]

    stand_in.work = put_model
    calls_and_work = namedtuple("ModelScope", "calls stand_in")(calls, stand_in)
    monkeypatch.setattr(modelscope, "snapshot_download", stand_in)
    return calls_and_work


# --- where it goes and where it may be


def test_download_goes_to_the_data_disk_if_there_is_one(machine):
    assert download.default_model_dir() == Path("models") / NAME
    (machine / "autodl-tmp").mkdir()
    assert download.default_model_dir() == machine / "autodl-tmp" / NAME
    assert download.default_model_dir("someone/Other") == machine / "autodl-tmp" / "Other"


PLACES = [
    f"autodl-tmp/{NAME}",
    f"autodl-tmp/THUCoAI/{NAME}",
    f"autodl-tmp/models/THUCoAI/{NAME}",
    f"autodl-tmp/{SNAPSHOT}",
    f"work/models/{NAME}",
    f"home/.cache/modelscope/hub/THUCoAI/{NAME}",
    f"home/.cache/modelscope/hub/models/THUCoAI/{NAME}",
    f"home/.cache/modelscope/{SNAPSHOT}",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("data_disk", [True, False])
def test_model_is_found_in_every_place(machine, place, data_disk):
    if data_disk:
        (machine / "autodl-tmp").mkdir()
    assert download.find_downloaded() is None
    directory = put_model(machine / place)
    assert download.find_downloaded().resolve() == directory
    assert helpers.resolve_model("6b").resolve() == directory


@pytest.mark.parametrize("place", [f"THUCoAI/{NAME}", f"models/THUCoAI/{NAME}", SNAPSHOT])
def test_modelscope_cache_variable_is_honoured(machine, monkeypatch, place):
    monkeypatch.setenv("MODELSCOPE_CACHE", str(machine / "elsewhere"))
    directory = put_model(machine / "elsewhere" / place)
    assert download.find_downloaded() == directory


def test_our_own_place_comes_first(machine):
    put_model(machine / PLACES[-1])
    own = put_model(machine / f"work/models/{NAME}")
    assert download.find_downloaded().resolve() == own


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.model", SHARD, "pytorch_model.bin.index.json"])
def test_incomplete_download_is_not_found(machine, missing):
    directory = put_model(machine / f"work/models/{NAME}")
    (directory / missing).unlink()
    assert download.find_downloaded() is None
    with pytest.raises(CheckpointError, match="model not downloaded"):
        helpers.resolve_model("6b")


def test_cut_shard_is_not_found_and_the_next_place_is_tried(machine):
    directory = put_model(machine / f"work/models/{NAME}")
    shard = directory / SHARD
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert download.find_downloaded() is None
    whole = put_model(machine / PLACES[-1])
    assert download.find_downloaded() == whole


# --- downloading


def test_download_calls_modelscope_and_returns_the_directory(machine, modelscope_calls):
    target = helpers.download_model(local_dir=machine / "my models")
    assert target == machine / "my models"
    (arguments,) = modelscope_calls.calls
    assert arguments["model_id"] == "THUCoAI/CharacterGLM-6B"
    assert arguments["local_dir"] == str(target)
    assert "*.py" in arguments["ignore_patterns"], "remote code is not even fetched"


def test_stand_in_refuses_a_renamed_argument(modelscope_calls):
    with pytest.raises(TypeError):
        modelscope.snapshot_download("x", local_directory="y")


def test_ignored_files_are_remote_code_and_second_copies():
    def ignored(name):
        return any(fnmatch.fnmatch(name, pattern) for pattern in download.IGNORED_FILES)

    assert all(map(ignored, ["modeling_chatglm.py", "tokenization_chatglm.py", "a/b.py", "model.safetensors"]))
    needed = ["config.json", "tokenizer.model", "tokenizer_config.json", SHARD, "pytorch_model.bin.index.json"]
    assert not any(map(ignored, needed))


def test_default_target_is_the_data_disk(machine, modelscope_calls):
    (machine / "autodl-tmp").mkdir()
    assert helpers.download_model() == machine / "autodl-tmp" / NAME


def test_home_is_expanded(machine, modelscope_calls):
    assert helpers.download_model(local_dir="~/glm") == machine / "home" / "glm"


def test_a_model_that_is_there_is_not_fetched_again(machine, monkeypatch, modelscope_calls):
    set_free_disk(monkeypatch, 0)
    directory = put_model(machine / PLACES[-1])
    assert helpers.download_model() == directory
    own = put_model(machine / "own")
    assert helpers.download_model(local_dir=own) == own
    assert modelscope_calls.calls == []


def test_an_explicit_target_wins_over_a_copy_elsewhere(machine, modelscope_calls):
    put_model(machine / PLACES[-1])
    assert helpers.download_model(local_dir=machine / "own") == machine / "own"
    assert len(modelscope_calls.calls) == 1


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.model", SHARD])
def test_download_that_only_says_it_succeeded(machine, modelscope_calls, missing):
    modelscope_calls.stand_in.work = lambda directory: (put_model(directory) / missing).unlink()
    with pytest.raises(CheckpointError, match=missing):
        helpers.download_model()


def test_download_of_nothing(machine, modelscope_calls):
    modelscope_calls.stand_in.work = lambda directory: None
    with pytest.raises(CheckpointError, match="model directory not found"):
        helpers.download_model()


def test_failed_download_says_that_it_can_go_on(machine, modelscope_calls):
    def fail(directory):
        raise ConnectionError("connection reset by peer")

    modelscope_calls.stand_in.work = fail
    with pytest.raises(HelpersError, match="download failed.*connection reset.*断点继续") as raised:
        helpers.download_model()
    assert isinstance(raised.value.__cause__, ConnectionError)


def test_interrupt_is_not_swallowed(machine, modelscope_calls):
    def interrupt(directory):
        raise KeyboardInterrupt

    modelscope_calls.stand_in.work = interrupt
    with pytest.raises(KeyboardInterrupt):
        helpers.download_model()


# --- disk space


def test_full_disk_is_refused_before_the_download(machine, monkeypatch, modelscope_calls):
    set_free_disk(monkeypatch, 13.4e9)
    with pytest.raises(HelpersError, match=r"not enough disk space.*13\.4 GB.*13\.5 GB"):
        helpers.download_model()
    set_free_disk(monkeypatch, 13.6e9)
    helpers.download_model()
    assert len(modelscope_calls.calls) == 1


def test_what_is_there_already_counts(machine, monkeypatch):
    target = machine / "target"
    target.mkdir()
    with (target / SHARD).open("wb") as file:
        file.truncate(10_000_000_000)  # sparse: takes no room
    set_free_disk(monkeypatch, 3.6e9)
    download.require_disk_space(target)
    set_free_disk(monkeypatch, 3.4e9)
    with pytest.raises(HelpersError, match="not enough disk space"):
        download.require_disk_space(target)


def test_disk_of_a_target_that_is_not_there_yet(machine, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(Path(path)) or DiskUsage(1, 0, 10**12))
    download.require_disk_space(machine / "a" / "b" / "c")
    download.require_disk_space(Path("relative/target"))
    assert asked == [machine, machine / "work"]
