"""The folder of a training run: may it be used, is there room, and from which checkpoint does training go on?"""

import itertools
import json
import shutil
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from ..errors import CheckpointError, FinetuneError
from ..model.adapters import ADAPTER_CARD, ADAPTER_RECORD, adapter_file
from ..model.checkpoint import check_weight_file, read_json
from ..paths import free_bytes, make_writable_folder, write_json

RUN_FILES = (ADAPTER_RECORD, ADAPTER_CARD, "adapter_config.json", "adapter_model.safetensors", "training_args.bin")
NEW_RUN = "new-run"  # where a run trains that is to replace the one in the folder
SPARE_BYTES = 1_000_000  # logs, random states, JSON files


def last_complete_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint. Newer ones, which a killed process left half-written, are renamed."""
    while found := get_last_checkpoint(str(directory)):
        checkpoint = Path(found)
        if not (missing := what_is_missing(checkpoint)):
            return checkpoint
        aside = (directory / f"incomplete-{checkpoint.name}-{number}" for number in itertools.count(1))
        kept = checkpoint.rename(next(path for path in aside if not path.exists()))
        print(
            f"跳过没有写完的 checkpoint [incomplete checkpoint skipped]：{checkpoint.name}，{missing}。"
            f"没有删除，改名为 {kept.name}",
            flush=True,
        )
    return None


def what_is_missing(checkpoint: Path) -> str:
    """Why training cannot go on from a checkpoint; "" if it was written to its end."""
    try:
        adapter_file(checkpoint)
        read_json(checkpoint / "trainer_state.json")  # the Trainer writes it last
    except CheckpointError as error:
        return str(error).partition("：")[0]
    states = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *checkpoint.glob("rng_state*.pth")]
    for file in states if len(states) > 2 else [*states, checkpoint / "rng_state.pth"]:
        try:
            check_weight_file(file)
        except CheckpointError:
            return f"{file.name} 缺失或不完整（save_only_model 不保存它）"
    return ""


def check_folder(directory: Path, overwrite: bool) -> None:
    """Raise `HelpersError` if it is a model's, cannot be written, or, unless `overwrite`, a run finished there."""
    if (directory / "config.json").exists():
        raise FinetuneError(f"输出目录是一个模型目录 [output directory is a model]：{directory}。请换一个 output_dir")
    make_writable_folder(directory)
    if not overwrite and read_record(directory).get("finished"):
        raise _in_use(directory, "一次完成了的训练")


def open_run(directory: Path, settings: dict, needed_bytes: int, overwrite: bool) -> Path:
    """The folder for a run with these settings: `directory`, where an interrupted run with the same settings goes on.

    If `overwrite`, and another run is there, it is a folder within: what is there stays usable until `close_run`.
    Raises as `check_folder`, and if the disk is too full or, without `overwrite`, another run is there.
    """
    check_folder(directory, overwrite)
    if (free := free_bytes(directory)) < needed_bytes:
        raise FinetuneError(
            f"磁盘空间不足 [not enough disk space]：{directory} 所在磁盘剩 {free / 1e6:,.1f} MB，"
            f"checkpoint 约需 {needed_bytes / 1e6:,.1f} MB。请清理磁盘、换一个 output_dir，或减小 save_total_limit"
        )
    settings, run = json.loads(json.dumps(settings)), directory  # as they will be read back
    if _is_taken(directory, settings):
        if not overwrite:
            raise _in_use(directory, "另一组设置的训练")
        run = directory / NEW_RUN
        if _is_taken(run, settings):
            shutil.rmtree(run)  # begun to replace the same run, with other settings, and never finished
    write_record(run, settings)
    return run


def close_run(directory: Path, run: Path) -> None:
    """Put a complete run in the place of the one that it replaces; files that are no run's stay."""
    if run == directory:
        return
    while checkpoint := get_last_checkpoint(str(directory)):
        shutil.rmtree(checkpoint)
    for name in RUN_FILES:
        (directory / name).unlink(missing_ok=True)
    shutil.copytree(run, directory, dirs_exist_ok=True)
    shutil.rmtree(run)


def write_record(run: Path, settings: dict, result: dict | None = None) -> None:
    """Note beside an adapter how it is trained, and the result once it is."""
    record = {"settings": settings, "base": settings["base"], "finished": result is not None}
    write_json(run / ADAPTER_RECORD, record if result is None else record | {"result": result})


def read_record(directory: Path) -> dict:
    return read_json(directory / ADAPTER_RECORD) if (directory / ADAPTER_RECORD).is_file() else {}


def _is_taken(directory: Path, settings: dict) -> bool:
    record, begun = read_record(directory), directory.is_dir() and get_last_checkpoint(str(directory)) is not None
    return record.get("finished", False) or (begun and record.get("settings") != settings)


def _in_use(directory: Path, by: str) -> FinetuneError:
    return FinetuneError(
        f"输出目录里已有{by} [output directory in use]：{directory}。请换一个目录，或用 overwrite 重新开始"
    )


def bytes_needed(trainable_parameters: int, checkpoints_kept: int) -> int:
    """Room for the checkpoints kept, the one being written, and the final adapter.

    A checkpoint holds each trainable parameter three times in float32: itself and AdamW's two moments.
    """
    return 4 * trainable_parameters * (3 * (checkpoints_kept + 1) + 1) + SPARE_BYTES
