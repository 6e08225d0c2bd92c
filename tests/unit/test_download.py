"""Where the 6B model is looked for, and its download: modelscope's own client against a hub on 127.0.0.1."""

import itertools
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import huggingface_hub
import modelscope
import modelscope_hub
import pytest
import torch
from hub import LISTING, Hub, drop, stall, status
from modelscope_hub import _download, _legacy_api
from safetensors.torch import save_file

import helpers
from helpers.errors import CheckpointError, HelpersError
from helpers.model import download
from helpers.model.loading import NANO_DIR

CHECKPOINT = Path(__file__).parent.parent / "golden" / "compact"
SHARD, OTHER_SHARD = (f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2))
NEEDED = {
    *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.model", "README.md"),
    *(SHARD, OTHER_SHARD, "pytorch_model.bin.index.json"),
}
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
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home/.cache/huggingface/hub"))
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


def test_hugging_face_cache_is_found(machine):
    repository = machine / "home/.cache/huggingface/hub/models--thu-coai--CharacterGLM-6B"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("abc123")
    directory = put_model(repository / "snapshots/abc123")
    assert download.find_downloaded() == directory
    (directory / SHARD).unlink()
    assert download.find_downloaded() is None


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


# --- downloading, with the real client


@pytest.fixture
def hub(monkeypatch):
    """A hub that serves Nano as the 6B, with files beside it that nobody needs."""
    served = {file.name: file.read_bytes() for file in NANO_DIR.iterdir()}
    served |= {"modeling_characterglm.py": b"raise SystemExit", "deep/config.json": b"{}", "configuration.json": b"{}"}
    hub = Hub(download.MODEL_ID, served)
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    modelscope_hub.config.set_default_config(None)  # it is made once, from the environment
    be_impatient(monkeypatch)
    yield hub
    modelscope_hub.config.set_default_config(None)
    hub.shutdown()
    hub.server_close()


def be_impatient(monkeypatch):
    """What the client reads from MODELSCOPE_DOWNLOAD_TIMEOUT and its like once, when it is imported."""
    monkeypatch.setattr(_legacy_api, "DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(_legacy_api, "REPO_TREE_PAGE_MAX_ATTEMPTS", 1)
    monkeypatch.setattr(_download, "DOWNLOAD_RETRY_TIMES", 1)
    monkeypatch.setattr(_download, "DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0)


def assert_same_as_nano(directory):
    for name in NEEDED:
        assert (directory / name).read_bytes() == (NANO_DIR / name).read_bytes(), name


def test_download_gives_a_model_that_loads(machine, hub, capsys):
    target = helpers.download_model(local_dir=machine / "my models")
    assert target == machine / "my models"
    assert hub.requested() == NEEDED, "no remote code, nothing in subfolders"
    assert {file.name for file in target.iterdir()} == NEEDED | {download.MANIFEST}
    assert_same_as_nano(target)
    assert "downloaded and verified" in capsys.readouterr().out
    model, _ = helpers.load(target)
    assert model.num_parameters() == 8_654_592


def test_a_second_start_is_one_line_and_asks_nobody(machine, hub, capsys):
    helpers.download_model()
    hub.requests.clear()
    capsys.readouterr()
    assert helpers.download_model() == download.default_model_dir()
    said = capsys.readouterr()
    assert said.out.count("\n") == 1 and "already downloaded" in said.out
    assert said.err == ""
    assert hub.requests == []


@pytest.mark.parametrize("local_dir", [None, "own"])
def test_a_model_that_is_there_is_not_fetched(machine, monkeypatch, hub, local_dir):
    set_free_disk(monkeypatch, 0)
    directory = put_model(machine / (local_dir or PLACES[-1]))
    assert helpers.download_model(local_dir=local_dir and machine / local_dir) == directory
    assert hub.requests == []


def test_an_explicit_target_wins_over_a_copy_elsewhere(machine, hub):
    put_model(machine / PLACES[-1])
    assert_same_as_nano(helpers.download_model(local_dir=machine / "own"))


def test_default_target_is_the_data_disk(machine, hub):
    (machine / "autodl-tmp").mkdir()
    assert helpers.download_model() == machine / "autodl-tmp" / NAME


def test_home_is_expanded(machine, hub):
    assert helpers.download_model(local_dir="~/glm") == machine / "home" / "glm"


def test_safetensors_are_taken_if_the_hub_has_nothing_else(machine, hub, tmp_path):
    write_safetensors(tmp_path / "model.safetensors")
    hub.files = {name: body for name, body in hub.files.items() if not name.startswith("pytorch_model")}
    hub.files |= {"model.safetensors": (tmp_path / "model.safetensors").read_bytes(), "model.onnx": b"x"}
    target = helpers.download_model()
    assert {"model.safetensors", "config.json"} <= hub.requested()
    assert "model.onnx" not in hub.requested()
    assert helpers.load(target)[0].num_parameters() == 8_654_592


def write_safetensors(file):
    """Nano's weights under their original names in one file."""
    weights = {}
    for shard in NANO_DIR.glob("*.bin"):
        weights |= torch.load(shard, weights_only=True)
    save_file(weights, file)


def test_one_format_only():
    both = ["config.json", "model.safetensors", SHARD, "pytorch_model.bin.index.json", "model-00001.safetensors"]
    assert set(download.needed_files(both)) == {"config.json", "model.safetensors", "model-00001.safetensors"}
    assert "training_args.bin" not in download.needed_files(["config.json", SHARD, "training_args.bin"])


@pytest.mark.parametrize("names", [[], ["README.md"], ["config.json"], [SHARD], ["config.json", "../" + SHARD]])
def test_a_repository_without_a_model_is_refused(machine, hub, names):
    hub.files = dict.fromkeys(names, b"x")
    with pytest.raises(HelpersError, match="no model in this repository"):
        helpers.download_model()
    assert hub.requested() == set()


# --- going on


def test_a_dropped_connection_is_resumed_as_often_as_it_gets_further(machine, hub):
    hub.faults[SHARD] = itertools.repeat(drop(1_000_000), 4)  # the client alone gives up at the second
    assert_same_as_nano(helpers.download_model())
    ranges = [asked for name, asked in hub.requests if name == SHARD]
    assert ranges == [None, *(f"bytes={n}000000-" for n in (1, 2, 3, 4))]


def test_a_dead_connection_ends_with_what_to_do(machine, hub):
    hub.faults[SHARD] = itertools.chain([drop(1_000_000)], itertools.repeat(drop(0)))
    with pytest.raises(HelpersError, match=rf"no connection.*{SHARD}.*断点继续"):
        helpers.download_model()
    hub.faults.clear()
    hub.requests.clear()
    assert_same_as_nano(helpers.download_model())
    assert (SHARD, "bytes=1000000-") in hub.requests
    assert (OTHER_SHARD, None) not in hub.requests, "a finished file is not fetched again"


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)],
    ids=["Ctrl-C", "SIGKILL"],
)
def test_a_stopped_process_is_resumed(machine, hub, interruptible, number):
    released = threading.Event()
    hub.faults[SHARD] = iter([stall(3_000_000, released)])
    command = [sys.executable, "-m", "helpers", "download", "--local-dir", str(machine / "target")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    partial = machine / "target" / f"{SHARD}.incomplete"
    wait_until(lambda: partial.exists() and partial.stat().st_size > 2_900_000, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    released.set()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "interrupted" in output
        assert "Traceback" not in output
    kept = partial.stat().st_size
    assert kept > 2_900_000
    hub.requests.clear()
    assert_same_as_nano(helpers.download_model(local_dir=machine / "target"))
    assert (SHARD, f"bytes={kept}-") in hub.requests


def wait_until(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- what can go wrong


@pytest.mark.parametrize(
    ("code", "message"),
    [(404, "not found, HTTP 404"), (403, "access denied"), (429, "rate limited, HTTP 429"), (500, "server error")],
)
@pytest.mark.parametrize("where", [LISTING, SHARD])
def test_refusals_say_what_to_do(machine, hub, code, message, where):
    hub.faults[where] = itertools.repeat(status(code))
    with pytest.raises(HelpersError, match=re.escape(message)):
        helpers.download_model()
    hub.faults.clear()
    assert_same_as_nano(helpers.download_model())


def test_an_unknown_model_is_named(machine, hub):
    with pytest.raises(HelpersError, match=r"someone/nothing.*not found"):
        helpers.download_model("someone/nothing")


def test_a_stalled_connection_is_given_up(machine, hub):
    released = threading.Event()
    hub.faults[SHARD] = itertools.repeat(stall(0, released))
    with pytest.raises(HelpersError, match="no connection|stalled"):
        helpers.download_model()
    released.set()


def test_no_network_is_said(machine, hub):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(HelpersError, match=r"no connection.*network_turbo"):
        helpers.download_model()


@pytest.mark.parametrize("claim", [{"Sha256": "0" * 64}, {"Size": 5}, {"Size": 10**7}], ids=str)
def test_content_that_is_not_what_the_hub_lists_is_refused(machine, hub, claim):
    hub.listed[SHARD] = claim
    with pytest.raises(HelpersError, match=rf"{SHARD}.*wrong size or sha256"):
        helpers.download_model()
    assert not (download.default_model_dir() / SHARD).exists()
    assert download.find_downloaded() is None


@pytest.mark.parametrize("harm", ["missing", "flipped"])
def test_a_client_that_only_says_it_succeeded(machine, hub, monkeypatch, harm):
    real = modelscope.snapshot_download

    def careless(*args, **kwargs):
        real(*args, **kwargs)
        shard = Path(kwargs["local_dir"]) / SHARD
        shard.unlink() if harm == "missing" else flip_a_byte(shard)

    monkeypatch.setattr(modelscope, "snapshot_download", careless)
    with pytest.raises(CheckpointError, match=SHARD):
        helpers.download_model()
    assert download.find_downloaded() is None


def flip_a_byte(file):
    """In the middle, where neither size nor the archive's table of contents changes."""
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        byte = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte[0] ^ 1]))


def test_flipped_bytes_are_found_when_asked_and_only_that_file_is_fetched(machine, hub, capsys):
    target = helpers.download_model()
    flip_a_byte(target / SHARD)
    hub.requests.clear()
    helpers.download_model()
    assert hub.requests == [], "not asked: one line"
    helpers.download_model(verify=True)
    assert f"[damaged]：{SHARD}" in capsys.readouterr().out
    assert hub.requested() == {SHARD}
    assert_same_as_nano(target)


def test_an_intact_model_is_verified_without_fetching_it_again(machine, hub, capsys):
    target = helpers.download_model()
    hub.requests.clear()
    assert helpers.download_model(verify=True) == target
    assert hub.requested() == set()
    assert "[verified]" in capsys.readouterr().out


def test_a_model_of_unknown_origin_is_verified_against_the_hub(machine, hub):
    directory = machine / PLACES[-1]
    shutil.copytree(NANO_DIR, directory)
    flip_a_byte(directory / SHARD)
    assert helpers.download_model(verify=True) == directory
    assert hub.requested() == {SHARD}
    assert_same_as_nano(directory)


def test_a_changed_size_is_noticed_at_once(machine, hub):
    target = helpers.download_model()
    with (target / "tokenizer.model").open("ab") as file:
        file.write(b"x")
    assert download.find_downloaded() is None
    helpers.download_model()
    assert_same_as_nano(target)


@pytest.fixture
def small_disk(machine):
    """A file system of its own, of 8 MB: less than Nano needs."""
    folder = machine / "small disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"cannot mount a file system here (needs root): {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_on_the_way(small_disk, hub):
    # It looked large enough before the download, as when another program writes at the same time.
    with pytest.raises(HelpersError, match=r"disk full.*断点继续"):
        helpers.download_model(local_dir=small_disk / "target")
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    hub.requests.clear()
    assert_same_as_nano(helpers.download_model(local_dir=small_disk / "target"))
    assert any(asked for _, asked in hub.requests), "went on where the disk was full"


def test_a_read_only_disk_is_said(small_disk, hub):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(HelpersError, match="cannot write"):
        helpers.download_model(local_dir=small_disk / "target")


# --- disk space


def test_full_disk_is_refused_before_the_download(machine, monkeypatch, hub):
    set_free_disk(monkeypatch, 1.0e9)
    with pytest.raises(HelpersError, match=r"not enough disk space.*1\.0 GB.*1\.0 GB"):
        helpers.download_model()
    assert hub.requested() == set()
    set_free_disk(monkeypatch, 1.02e9)
    helpers.download_model()


def check_room(target):
    download.check_disk_space(target, download.bytes_needed(target))


def test_the_6b_needs_its_size_and_a_margin(machine, monkeypatch):
    set_free_disk(monkeypatch, 13.4e9)
    with pytest.raises(HelpersError, match=r"not enough disk space.*13\.4 GB.*13\.5 GB"):
        check_room(machine / "target")
    set_free_disk(monkeypatch, 13.6e9)
    check_room(machine / "target")


@pytest.mark.parametrize("suffix", ["", ".incomplete"])
def test_what_is_there_already_counts(machine, monkeypatch, suffix):
    target = machine / "target"
    target.mkdir()
    with (target / f"{SHARD}{suffix}").open("wb") as file:
        file.truncate(10_000_000_000)  # sparse: takes no room
    with (target / "something else").open("wb") as file:
        file.truncate(10_000_000_000)
    set_free_disk(monkeypatch, 3.6e9)
    check_room(target)
    set_free_disk(monkeypatch, 3.4e9)
    with pytest.raises(HelpersError, match="not enough disk space"):
        check_room(target)


def test_disk_of_a_target_that_is_not_there_yet(machine, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(Path(path)) or DiskUsage(1, 0, 10**12))
    check_room(machine / "a" / "b" / "c")
    check_room(Path("relative/target"))
    assert asked == [machine, machine / "work"]
