"""TRL's SFTTrainer as a recipe of benchmarks/lora.py: what many would pick instead (pip install trl)."""

import tempfile
from collections.abc import Callable

from datasets import Dataset


def sft_step(model, tokenizer, rows: list[dict], batch_size: int, padding_free: bool) -> tuple[Callable, Callable]:
    """(its collator, one forward and backward pass on some rows), with its best settings for these rows.

    Only the replies are learned, by the labels of the rows. `padding_free`: the rows behind each other in one sequence;
    else rows of similar length together, which is for the caller to choose, padded to the longest.
    """
    from trl import SFTConfig, SFTTrainer

    def fields(rows: list[dict]) -> list[dict]:
        return [{name: row[name] for name in ("input_ids", "labels")} for row in rows]

    arguments = SFTConfig(
        tempfile.gettempdir(),
        per_device_train_batch_size=batch_size,
        max_length=None,  # the rows fit
        padding_free=padding_free,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        dataset_kwargs={"skip_prepare_dataset": True},  # they are tokens already
    )
    dataset = Dataset.from_list(fields(rows[:batch_size]))
    trainer = SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1  # as its own loop sets it

    def collate(rows: list[dict]) -> dict:
        return trainer.data_collator(fields(rows))

    return collate, lambda rows: trainer.training_step(trainer.model, collate(rows))
