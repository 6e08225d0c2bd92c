"""The run receipt: complete, portable, honest about what it cannot hold."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from helpers.cli.app import app
from helpers.inspect import receipt
from helpers.inspect.receipt import ReceiptError, describe_files, shorten_paths, write_receipt
from helpers.paths import PROJECT_DIR


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
        ([1.0, float("nan")], r"metrics.bad.1 = nan"),
        ({"deep": {1}}, "metrics.bad.deep .* set .*not serialisable"),
        ({3: 1}, "metrics.bad.3 .*keys must be strings"),
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


# --- comparing two


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two receipts of the same run but for the time it took."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes(b"{}")
    options: dict[str, Any] = {"model_dir": model, "parameters": {"SEED": 1, "LIST": [1, 2]}}
    metrics = {"loss": 0.5, "seconds": 1.0, "memory_gib": {"now": 2.0}}
    changed = metrics | {"seconds": 1.5, "memory_gib": {"now": 2.5}}
    first = write_receipt(tmp_path / "a", "01", **options, metrics=metrics)
    return first, write_receipt(tmp_path / "b", "01", **options, metrics=changed)


def compare(*files: Path) -> Any:
    return CliRunner().invoke(app, ["receipt", *map(str, files)])


def edit(file: Path, change: Any) -> None:
    """Apply `change` to the receipt in `file`."""
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def test_measurements_are_shown_but_are_no_difference(pair: tuple[Path, Path]) -> None:
    done = compare(*pair)
    assert done.exit_code == 0
    assert "0 differences" in done.stdout and "另有 2 个测量值" in done.stdout
    assert "memory_gib.now" in done.stdout
    same = compare(pair[0], pair[0])
    assert same.exit_code == 0 and "另有 0 个" in same.stdout


@pytest.mark.parametrize(
    ("change", "row"),
    [
        (lambda r: r["versions"].update(torch="2.6.0"), ("versions", "torch", torch.__version__, "2.6.0")),
        (lambda r: r["device"].update(type="tpu"), ("device", "type", None, "tpu")),
        (lambda r: r["model"]["files"][0].update(sha256="00"), ("model", "config.json.sha256", None, "00")),
        (lambda r: r["model"]["files"].insert(0, {"name": "x", "bytes": 1}), ("model", "x.bytes", "（没有）", "1")),
        (lambda r: r["parameters"].update(SEED=2), ("parameters", "SEED", "1", "2")),
        (lambda r: r["parameters"]["LIST"].pop(), ("parameters", "LIST.1", "2", "（没有）")),
        (lambda r: r["metrics"].update(loss=0.6), ("metrics", "loss", "0.5", "0.6")),
        (lambda r: r.update(model=None), ("model", "name", "model", "（没有）")),
    ],
)
def test_every_difference_is_named(pair: tuple[Path, Path], change: Any, row: tuple) -> None:
    edit(pair[1], change)
    rows = [r for r in receipt.compare_receipts(*pair) if not receipt.is_measurement(*r[:2])]
    found = {r[:2]: r[2:] for r in rows}[row[:2]]
    assert found == (row[2] or found[0], row[3])
    assert rows == sorted(rows, key=lambda r: list(receipt.SECTIONS).index(r[0]))
    assert compare(*pair).exit_code == 1


@pytest.mark.parametrize("content", [None, "not json", "[1]", "{}"])
def test_what_is_no_receipt_is_refused(pair: tuple[Path, Path], content: str | None) -> None:
    pair[1].unlink() if content is None else pair[1].write_text(content)
    done = compare(*pair)
    assert done.exit_code == 2
    assert pair[1].name in done.stderr
