"""What needs a CUDA GPU: the notebooks on it, and speed and memory of the 6B, kept in benchmarks/results/.

`make test-gpu`. The 6B is the downloaded one, or else random weights of the same shape (12.5 GB, written once into
models/6b-shape). The figures come from benchmarks/figures.py, which the ordinary tests run on a CPU.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import helpers
from helpers.model.download import find_downloaded
from helpers.model.loading import MIN_GPU_GIB, gpu_gib

PROJECT = Path(__file__).parents[2]
RESULTS = PROJECT / "benchmarks" / "results"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="没有 CUDA GPU [no CUDA GPU on this machine]"),
]


def python(*arguments: object) -> None:
    """Run `python ...` in the project; fail with what it printed."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


@pytest.fixture(scope="module")
def six_b() -> Path:
    """The 6B's folder, or that of a checkpoint of its shape."""
    if gpu_gib() < MIN_GPU_GIB:
        pytest.skip(f"the GPU has {gpu_gib():.0f} GiB, the 6B needs {MIN_GPU_GIB}")
    found = find_downloaded() or PROJECT / "models" / "6b-shape"
    if not (found / "config.json").is_file():  # written last
        python("scripts/write_6b_shape.py", found)
    return found


@pytest.fixture(scope="module")
def figures(six_b: Path) -> dict:
    """The figures of the 6B on this GPU, measured now."""
    python("benchmarks/figures.py", "--model", six_b, "--output-dir", RESULTS)
    newest = max(RESULTS.glob("*.json"), key=lambda file: file.stat().st_mtime)
    return json.loads(newest.read_text(encoding="utf-8"))


def test_figures_name_the_device(figures: dict) -> None:
    assert figures["device"]["name"] == torch.cuda.get_device_name(0)
    assert figures["model"]["parameters"] == 6_243_584_000


def test_chat_stays_under_14_gb(figures: dict) -> None:
    assert figures["chat"]["peak_bytes"] < 14e9


def test_lora_stays_under_20_gb(figures: dict) -> None:
    lora = figures["lora"]
    assert (lora["batch"], lora["tokens"]) == (4, 512)
    assert lora["peak_bytes"] < 20e9


@pytest.mark.parametrize("task", ["chat", "lora"])
def test_estimates_hold(figures: dict, task: str) -> None:
    assert figures[task]["estimated_bytes"] == pytest.approx(figures[task]["peak_bytes"], rel=0.1)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_estimates_of_quantised_weights_hold(six_b: Path, quantization: str) -> None:
    before = torch.cuda.memory_allocated()
    model, _ = helpers.load(six_b, quantization=quantization)
    expected = helpers.estimate("chat", six_b, quantization=quantization).parts["权重"]
    assert torch.cuda.memory_allocated() - before == pytest.approx(expected, rel=0.1)
    del model
    torch.cuda.empty_cache()


def test_nano_says_the_same_as_on_the_cpu() -> None:
    card = helpers.get_character("苏梦远")
    replies = []
    for device in ("cpu", "cuda"):
        model, tokenizer = helpers.load("nano", dtype="float32", device_map=device)
        replies.append(helpers.chat(model, tokenizer, card, "你好呀，小苏", do_sample=False)[0])
    assert replies[0] == replies[1]


def test_every_notebook_runs_on_the_gpu(tmp_path: Path) -> None:
    # On the real 6B if it is here. Random weights cannot hold a conversation, and the notebooks check that one was held.
    model = "6b" if find_downloaded() and gpu_gib() >= MIN_GPU_GIB else "nano"
    python("-m", "helpers", "run", "--model", model, "--output-dir", tmp_path)
    assert torch.cuda.get_device_name(0) in (tmp_path / "receipt_01.json").read_text(encoding="utf-8")
