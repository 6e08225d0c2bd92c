"""CharacterGLM-6B from ModelScope: where it goes, whether it is there already, and fetching it."""

import os
import shutil
from pathlib import Path

from .checkpoint import REDOWNLOAD, verify_checkpoint
from .errors import CheckpointError, HelpersError

MODEL_ID = "THUCoAI/CharacterGLM-6B"
DOWNLOAD_BYTES = 12_500_000_000  # the two weight shards; the rest is about 1 MB
MARGIN_BYTES = 1_000_000_000
AUTODL_DATA_DISK = Path("/root/autodl-tmp")
# Remote code is not fetched: this project never runs it.
IGNORED_FILES = ["*.py", "*.safetensors", "*.msgpack", "*.h5"]


def default_model_dir(model_id: str = MODEL_ID) -> Path:
    """Where a download goes: the data disk on AutoDL (50 GB, kept across shutdown), else `./models`."""
    base = AUTODL_DATA_DISK if AUTODL_DATA_DISK.is_dir() else Path("models")
    return base / model_id.split("/")[-1]


def candidate_dirs(model_id: str = MODEL_ID) -> list[Path]:
    """Where the model may be already: our own place, then both path schemes of ModelScope's cache.

    modelscope <= 1.37 writes `{cache}/THUCoAI/CharacterGLM-6B` or `{cache}/models/THUCoAI/CharacterGLM-6B` (by default
    under `hub`), newer versions `{cache}/models/THUCoAI--CharacterGLM-6B/snapshots/master`.
    """
    cache = Path(os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope").expanduser()
    snapshot = Path(model_id.replace("/", "--")) / "snapshots" / "master"
    found = [default_model_dir(model_id), Path("models") / model_id.split("/")[-1]]
    for base in (AUTODL_DATA_DISK, cache, cache / "hub"):
        found += [base / model_id, base / "models" / model_id, base / "models" / snapshot]
    return found


def find_downloaded(model_id: str = MODEL_ID) -> Path | None:
    """The first candidate directory with a complete checkpoint, or None."""
    return next(filter(_is_complete, candidate_dirs(model_id)), None)


def verify_download(directory: Path) -> None:
    """Raise `CheckpointError` unless weights, config and tokenizer are there and whole."""
    verify_checkpoint(directory)
    if not (directory / "tokenizer.model").is_file():
        raise CheckpointError(f"缺少文件 tokenizer.model [missing file]：{directory}。{REDOWNLOAD}")


def _is_complete(directory: Path) -> bool:
    try:
        verify_download(directory)
    except CheckpointError:
        return False
    return True


def download_model(model_id: str = MODEL_ID, local_dir: str | Path | None = None) -> Path:
    """Download a model from ModelScope (12.5 GB for the 6B), or find it where it already is.

    An interrupted download goes on where it stopped when you call this again.

    Args:
        local_dir: the target; by default `default_model_dir()`.

    Returns:
        The directory with the complete checkpoint.

    Raises:
        HelpersError: the disk is too full, or ModelScope cannot be reached.
        CheckpointError: the download ended but files are missing or damaged.
    """
    if local_dir is None and (found := find_downloaded(model_id)):
        return found
    target = Path(local_dir).expanduser() if local_dir is not None else default_model_dir(model_id)
    if _is_complete(target):
        return target
    require_disk_space(target)
    from modelscope import snapshot_download  # slow import, only needed here

    try:
        snapshot_download(model_id, local_dir=str(target), ignore_patterns=IGNORED_FILES)
    except Exception as error:
        raise HelpersError(f"下载没有完成 [download failed]：{error}。再运行一次会从断点继续") from error
    verify_download(target)  # a version of modelscope reported success although files had failed
    return target


def free_bytes(target: Path) -> int:
    """Free space on the disk of `target`, which need not exist yet."""
    existing = next(parent for parent in [target, *target.absolute().parents] if parent.exists())
    return shutil.disk_usage(existing).free


def require_disk_space(target: Path, needed: int = DOWNLOAD_BYTES) -> None:
    """Raise `HelpersError` unless the disk of `target` has room for what is still to be fetched, plus 1 GB."""
    present = sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) if target.is_dir() else 0
    free = free_bytes(target)
    missing = max(0, needed - present) + MARGIN_BYTES
    if free < missing:
        raise HelpersError(
            f"磁盘空间不足 [not enough disk space]：{target} 所在磁盘剩 {free / 1e9:.1f} GB，还需要 {missing / 1e9:.1f} GB。"
            "请清理数据盘，或把 local_dir 指到更大的磁盘"
        )
