"""The run receipt: complete, portable, honest about what it cannot hold."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import receipt
from helpers.receipt import PROJECT_DIR, ReceiptError, describe_files, shorten_paths, write_receipt


def write(folder: Path, **changes: Any) -> dict[str, Any]:
    """Write a receipt and read it back."""
    content = {"model_dir": None, "parameters": {}, "metrics": {}} | changes
    return json.loads(write_receipt(folder, "01", **content).read_text(encoding="utf-8"))


def test_receipt_holds_what_a_reader_needs(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes(b"{}")
    found = write(tmp_path / "out", model_dir=model, parameters={"SEED": 1}, metrics={"loss": 0.5, "replies": ["好"]})
    assert found["notebook"] == "01"
    assert found["time_utc"].endswith("+00:00")
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"].keys() >= {"python", "transformers", "peft", "helpers"}
    assert found["device"]["type"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found["device"]["name"]
    assert found["device"]["memory_gib"] > 0
    digest = hashlib.sha256(b"{}").hexdigest()
    assert found["model"] == {"name": "model", "files": [{"name": "config.json", "bytes": 2, "sha256": digest}]}
    assert found["parameters"] == {"SEED": 1}
    assert found["metrics"] == {"loss": 0.5, "replies": ["好"]}


@pytest.mark.parametrize(
    ("notebook", "name"), [(1, "receipt_01.json"), ("02_fastapi", "receipt_02.json"), ("4", "receipt_04.json")]
)
def test_receipt_name_follows_the_notebook(tmp_path: Path, notebook: str | int, name: str) -> None:
    assert write_receipt(tmp_path, notebook, model_dir=None, parameters={}, metrics={}).name == name


def test_notebook_without_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReceiptError, match="number"):
        write_receipt(tmp_path, "../evil", model_dir=None, parameters={}, metrics={})


def test_large_files_are_recorded_by_size_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipt, "HASH_LIMIT_BYTES", 10)
    (tmp_path / "b.bin").write_bytes(b"x" * 10)
    (tmp_path / "a.bin").write_bytes(b"x" * 9)
    (tmp_path / ".hidden").touch()
    small, large = describe_files(tmp_path)
    assert (small["name"], "sha256" in small) == ("a.bin", True)
    assert large == {"name": "b.bin", "bytes": 10}


def test_missing_model_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReceiptError, match="gone"):
        write(tmp_path, model_dir=tmp_path / "gone")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "metrics.bad = nan"),
        (float("inf"), "metrics.bad = inf"),
        ([1.0, float("nan")], r"metrics.bad\[1\]"),
        ({"deep": {1}}, "metrics.bad.deep .* set"),
        ({3: 1}, "metrics.bad .*3"),
        (torch.tensor(1.0), "Tensor"),
        (np.float32(1.0), "float32"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_name(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(ReceiptError, match=message):
        write(tmp_path, metrics={"bad": value})
    assert list(tmp_path.iterdir()) == []


def test_a_refused_receipt_leaves_the_old_one(tmp_path: Path) -> None:
    write(tmp_path, metrics={"loss": 1.0})
    with pytest.raises(ReceiptError):
        write(tmp_path, metrics={"loss": float("nan")})
    assert json.loads((tmp_path / "receipt_01.json").read_text())["metrics"] == {"loss": 1.0}


def test_an_interrupted_write_leaves_no_fragment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(receipt.os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_paths_are_shortened(tmp_path: Path) -> None:
    assert shorten_paths(str(PROJECT_DIR / "data" / "nano")) == "data/nano"
    assert shorten_paths(str(tmp_path / "model")) == "model"
    assert shorten_paths(f"saved to {PROJECT_DIR}/outputs/x") == "saved to outputs/x"
    assert shorten_paths(f"saved to {Path.home()}/x").endswith("~/x") or PROJECT_DIR.is_relative_to(Path.home())
    assert shorten_paths("/v1/chat/completions") == "/v1/chat/completions"
    assert shorten_paths("（微笑）你好/再见") == "（微笑）你好/再见"
    found = write(tmp_path, parameters={"OUTPUT_DIR": str(tmp_path)}, metrics={"file": tmp_path / "plot.png"})
    assert str(tmp_path) not in json.dumps(found)
