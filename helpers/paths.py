"""The ground: where the project is, files that appear whole or not at all, room on a disk."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import HelpersError

PROJECT_DIR = Path(__file__).resolve().parent.parent
MARGIN_BYTES = 1_000_000_000  # left free on a disk that something large is written to


def write_json(path: Path, data: dict[str, Any]) -> Path:
    """Write `data` as UTF-8 JSON through a temporary file, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp makes it readable by its owner only
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def free_bytes(target: Path) -> int:
    """Free space on the disk of `target`, which need not exist yet."""
    return shutil.disk_usage(_nearest_existing(target)).free


def _nearest_existing(target: Path) -> Path:
    return next(parent for parent in [target, *target.absolute().parents] if parent.exists())


def check_disk_space(target: Path, needed: int) -> None:
    """Raise `HelpersError` unless the disk of `target` has `needed` bytes free."""
    if (free := free_bytes(target)) < needed:
        raise HelpersError(
            f"磁盘空间不足 [not enough disk space]：{target} 所在磁盘剩 {free / 1e9:.1f} GB，还需要 {needed / 1e9:.1f} GB。"
            "请清理这个磁盘，或换一个更大的磁盘上的目录"
        )


def check_new_folder(target: Path, source: Path) -> None:
    """Raise `HelpersError` if `new_folder` could not make this target, as far as can be told without making it."""
    _check_usable(target, source)
    existing = _nearest_existing(target)
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise HelpersError(f"不能写入 [cannot write]：{target}（{existing} 不是可写的目录）。请换一个可写的目录")


def make_writable_folder(directory: Path) -> None:
    """Make `directory` unless it is there; `HelpersError` if it cannot be made or nothing can be written in it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise HelpersError(
            f"输出目录不可写 [output directory not writable]：{directory}（{error.strerror}）。请换一个目录"
        ) from None


@contextmanager
def new_folder(target: Path, sizes: dict[str, int], source: Path, margin: int = MARGIN_BYTES) -> Iterator[Path]:
    """A folder to write into, which is called `target` once the block has ended well. If it raises, nothing is left.

    A killed process leaves a folder beside the target whose name ends in `.partial`.

    Args:
        target: missing or empty.
        sizes: name to bytes of the large files that will be written.
        source: a directory that is read meanwhile; the target must not lie in it.
        margin: bytes that must be free besides.

    Raises:
        HelpersError: the target is in use or not writable, or the disk is full. What was there is kept.
    """
    _check_usable(target, source)
    with _beside(target, sum(sizes.values()) + margin) as work:
        work.mkdir()
        yield work
        for file in work.iterdir():
            _flush(file)
        if target.exists():
            target.rmdir()  # empty


@contextmanager
def new_file(target: Path, size: int) -> Iterator[Path]:
    """As `new_folder`, for one file of `size` bytes, which must not be there yet."""
    _check_is_new(target)
    with _beside(target, size + MARGIN_BYTES) as work:
        yield work
        _flush(work)
        _check_is_new(target)  # it may have come meanwhile


def _check_is_new(target: Path) -> None:
    if os.path.lexists(target):
        raise HelpersError(f"目标已经存在 [target exists]：{target}。没有改动它，请换一个名字，或先移走它")


@contextmanager
def _beside(target: Path, needed: int) -> Iterator[Path]:
    """A path on the target's disk, which is renamed to the target once the block has ended well."""
    check_disk_space(target, needed)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.", suffix=".partial") as temporary:
            work = Path(temporary) / target.name
            yield work
            work.rename(target)
    except HelpersError:
        raise
    except KeyboardInterrupt:
        print(f"中断了 [interrupted]：没有留下半份 {target.name}")
        raise
    except (OSError, SafetensorError) as error:
        raise _explained(error, target) from error


def _check_usable(target: Path, source: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise HelpersError(
            f"目标已经有别的内容 [target not empty]：{target}。没有改动它，请换一个新目录，或先移走里面的文件"
        )
    if source.resolve() in target.resolve().parents:
        raise HelpersError(f"目标在模型目录里面 [target inside the model]：{target}。请换到 {source} 之外")


def _flush(file: Path) -> None:
    file.chmod(0o644)  # safetensors makes its files readable by their owner only
    # Else a power cut after the rename could leave a file of the right size without its content.
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(error: Exception, target: Path) -> HelpersError:
    # SafetensorError carries the number of the system's error in its text only; NumPy has none, only "9 requested and 4 written".
    texts = (f"os error {errno.ENOSPC})", " requested and ")
    if getattr(error, "errno", None) == errno.ENOSPC or any(text in str(error) for text in texts):
        return HelpersError(
            f"磁盘写满了 [disk full]：{target} 所在的磁盘。没有留下半份文件，请清理这个磁盘，或换一个更大的磁盘上的目录"
        )
    return HelpersError(f"不能写入 [cannot write]：{target}（{error}）。请换一个可写的目录")
