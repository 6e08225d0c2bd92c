"""The folder of a training run: may it be used, is there room, and from which checkpoint does training go on?"""

import json
import re
import shutil
import tempfile
from pathlib import Path

from ..errors import CheckpointError, FinetuneError
from ..model.adapters import ADAPTER_RECORD, adapter_file
from ..model.checkpoint import check_weight_file, read_json
from ..paths import free_bytes, write_json

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
RUN_FILES = (ADAPTER_RECORD, "adapter_config.json", "adapter_model.safetensors", "README.md", "training_args.bin")
SPARE_BYTES = 1_000_000  # logs, random states, JSON files


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, complete or not."""
    found = [path for path in directory.iterdir() if path.is_dir() and CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(CHECKPOINT.fullmatch(path.name)[1]))


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: every file is there and none was cut short."""
    try:
        adapter_file(checkpoint)
        random_states = list(checkpoint.glob("rng_state*.pth"))
        for file in (checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *random_states):
            check_weight_file(file)
        read_json(checkpoint / "trainer_state.json")  # the Trainer writes it last
    except CheckpointError:
        return False
    return bool(random_states)


def last_complete_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint. Newer ones, which a killed process left half-written, are deleted."""
    for checkpoint in reversed(checkpoints(directory)):
        if is_complete(checkpoint):
            return checkpoint
        print(f"跳过没有写完的 checkpoint [incomplete checkpoint skipped]：{checkpoint.name}", flush=True)
        shutil.rmtree(checkpoint)
    return None


def open_run(directory: Path, settings: dict, needed_bytes: int, overwrite: bool) -> None:
    """Make sure that a run with these settings can use the folder, before anything is trained.

    An interrupted run with the same settings is left for `last_complete_checkpoint`. A finished run, or one with other
    settings, is refused, or deleted if `overwrite`.

    Raises:
        FinetuneError: the folder cannot be written, its disk is too full, or it is taken.
    """
    require_writable(directory)
    require_space(directory, needed_bytes)
    settings = json.loads(json.dumps(settings))  # as they will be read back
    record = read_json(directory / ADAPTER_RECORD) if (directory / ADAPTER_RECORD).is_file() else {}
    taken = record.get("finished", False) or (bool(checkpoints(directory)) and record.get("settings") != settings)
    if taken and not overwrite:
        what = "一次完成了的训练" if record.get("finished") else "另一组设置的训练"
        raise FinetuneError(
            f"输出目录里已有{what} [output directory in use]：{directory}。请换一个目录，或用 overwrite 删掉它重新开始"
        )
    if taken:
        delete_run(directory)
    write_json(directory / ADAPTER_RECORD, {"settings": settings, "base": settings["base"], "finished": False})


def delete_run(directory: Path) -> None:
    """Delete the adapter, the record and the checkpoints of a run; other files stay."""
    for checkpoint in checkpoints(directory):
        shutil.rmtree(checkpoint)
    for name in RUN_FILES:
        (directory / name).unlink(missing_ok=True)


def require_writable(directory: Path) -> None:
    """Make the folder and write a file in it; `FinetuneError` if that fails."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            file.write(b"0" * 4096)
    except OSError as error:
        raise FinetuneError(
            f"输出目录不可写 [output directory not writable]：{directory}（{error.strerror}）。请换一个 output_dir"
        ) from None


def require_space(directory: Path, needed_bytes: int) -> None:
    """`FinetuneError` if the disk of the folder has less room than the run will take."""
    free = free_bytes(directory)
    if free < needed_bytes:
        raise FinetuneError(
            f"磁盘空间不足 [not enough disk space]：{directory} 所在磁盘剩 {free / 1e6:,.1f} MB，"
            f"checkpoint 约需 {needed_bytes / 1e6:,.1f} MB。请清理磁盘、换一个 output_dir，或减小 save_total_limit"
        )


def bytes_needed(trainable_parameters: int, checkpoints_kept: int) -> int:
    """Room for the checkpoints kept, the one being written, and the final adapter.

    A checkpoint holds each trainable parameter three times in float32: itself and AdamW's two moments.
    """
    return 4 * trainable_parameters * (3 * (checkpoints_kept + 1) + 1) + SPARE_BYTES
