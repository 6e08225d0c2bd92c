"""Training a LoRA adapter with transformers' Trainer: sensible defaults, and failures that explain themselves."""

import dataclasses
import hashlib
import json
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import is_in_notebook

from ..characters.personas import as_session_meta
from ..errors import FinetuneError, did_you_mean
from ..model.adapters import ADAPTER_CARD, ADAPTER_RECORD, base_fingerprint
from ..paths import write_json
from .checkpoints import bytes_needed, last_complete_checkpoint, open_run
from .encoding import IGNORED, collate, pad
from .evaluation import summed_loss
from .lora import refuse_unmoved
from .progress import LiveCurve, LogLines

BATCH_SIZE = 4
MANY_PARAMETERS = 1e9
FILLER = {"input_ids": [0], "labels": [IGNORED]}  # counts for nothing
# transformers 5 renamed these; the old names are known better, and would lose against a default under the new one.
NEW_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
NO_EFFECT_ON_RESULT = {"output_dir", "disable_tqdm", "eval_on_start"}


def default_learning_rate(model) -> float:
    """2e-4, usual for LoRA on billions of parameters; a model as small as Nano needs, and bears, twenty times that."""
    return 2e-4 if model.num_parameters() > MANY_PARAMETERS else 4e-3


def training_arguments(model, output_dir, **chosen) -> TrainingArguments:
    """transformers' TrainingArguments with defaults for a LoRA adapter; any field can be `chosen`.

    Half precision and gradient checkpointing (transformers 5: `activation_checkpointing`) follow from the model:
    bfloat16 or float16 if it was loaded so on a GPU, checkpointing on a GPU for models of more than 1e9 parameters.
    transformers then lets gradients reach the adapters although everything before them is frozen.

    Raises:
        FinetuneError: an unknown field (with the closest known one), or values that transformers refuses.
    """
    refuse_unknown_arguments(chosen)
    chosen = {NEW_NAMES.get(name, name): value for name, value in chosen.items()}
    on_gpu = model.device.type == "cuda"
    defaults = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": BATCH_SIZE,
        "per_device_eval_batch_size": 8,
        "learning_rate": default_learning_rate(model),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,  # below 1: a share of all steps
        "train_sampling_strategy": "group_by_length",
        "logging_steps": 10,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 2,  # the newest and the best
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "bf16": on_gpu and model.dtype == torch.bfloat16,
        "fp16": on_gpu and model.dtype == torch.float16,
        "activation_checkpointing": on_gpu and model.num_parameters() > MANY_PARAMETERS,
        "logging_nan_inf_filter": False,  # it would hide a NaN loss
        "remove_unused_columns": False,
        "dataloader_pin_memory": on_gpu,
        "ddp_find_unused_parameters": False,  # every adapter takes part in every step
        "use_cpu": model.device.type == "cpu",
        "report_to": "none",
        "disable_tqdm": not is_in_notebook(),
        "seed": 0,
    }
    try:
        return TrainingArguments(output_dir=str(output_dir), **defaults | chosen)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise FinetuneError(f"训练参数没有意义 [invalid training argument]：{error}") from None


def refuse_unknown_arguments(names) -> None:
    """Raise `FinetuneError` for the first name that is no field of TrainingArguments, or that is set here."""
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init} - {"output_dir"}
    for name in names:
        if name not in known:
            raise FinetuneError(
                f"TrainingArguments 没有参数 {name} [unknown training argument]。{did_you_mean(name, known)}"
            )


class EpochGroupedSampler(LengthGroupedSampler):
    """Groups rows of similar length, in an order that follows from seed and epoch alone.

    transformers' own sampler draws from torch's global random numbers: processes would disagree on the order, and a
    resumed epoch would not have the order it began with.

    Args:
        batch_size: rows of one training step, over all processes.
        fillers: how many rows behind the others fill up the last step; they always come last.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int, fillers: int = 0):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.fillers, self.epoch = seed, fillers, 0

    def __len__(self):
        return len(self.lengths) + self.fillers

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before every epoch."""
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        return iter([*super().__iter__(), *range(len(self.lengths), len(self))])


class LoraTrainer(Trainer):
    """transformers' Trainer with a repeatable order, an exact held-out loss, and a stop at the first NaN."""

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows, args = train_dataset or self.train_dataset, self.args
        lengths = [len(row["input_ids"]) for row in rows if row is not FILLER]
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return EpochGroupedSampler(step, lengths, seed, fillers=len(rows) - len(lengths))

    def training_step(self, *args, **kwargs):
        """As in transformers; raises before a loss that is not finite can reach the weights."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise FinetuneError(
                f"第 {self.state.global_step + 1} 步的 loss 是 {loss.item()} [loss is not finite]，训练已停止，之前的 checkpoint 还在。"
                f"常见原因：学习率太大（现在最高 {self.args.learning_rate:g}，试试十分之一）；"
                "float16 溢出（GPU 支持时用 bfloat16）；底模的权重已损坏"
            )
        return loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict:
        """The mean loss of a held-out token.

        transformers would average over batches, so that a token of a batch with short replies counts for more.
        """
        rows = (eval_dataset or self.eval_dataset)[self.args.process_index :: self.args.world_size]
        sums = torch.tensor(summed_loss(self.model, rows, self.args.eval_batch_size), dtype=torch.float64)
        total, count = self.accelerator.reduce(sums.to(torch.float32).to(self.args.device), "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": total / count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def finetune(model, train_rows, eval_rows, output_dir, *, card=None, overwrite=False, callbacks=(), **training) -> dict:
    """Train the adapter of `model` (see `add_lora`) and keep the one with the lowest held-out loss in `output_dir`.

    A run that was interrupted goes on from its last complete checkpoint if it is started again with the same settings.

    Args:
        train_rows, eval_rows: sequences from `encode_samples`.
        output_dir: gets the adapter, `finetune.json` and the checkpoints.
        card: the persona that the adapter speaks as; kept beside it, so that the API server can use it.
        overwrite: delete a finished run, or one with other settings, that is already in `output_dir`.
        callbacks: further `TrainerCallback`s.
        **training: fields of transformers' TrainingArguments.

    Returns:
        `steps`, `seconds` and `samples_per_second` (of this call), `train_loss`, `eval_loss` (the lowest), `best_step`,
        `resumed_from` (a step or None), `history` (what was logged). The model is left in evaluation mode.

    Raises:
        FinetuneError: before training: senseless arguments, a folder that is taken, not writable or too full. While
            training: a loss that is not finite, or out of memory. After it: an adapter that has not changed.
    """
    directory = Path(output_dir).expanduser().absolute()
    arguments = training_arguments(model, directory, **training)
    settings = describe_settings(model, train_rows, eval_rows, training)
    needed = bytes_needed(model.num_parameters(only_trainable=True), arguments.save_total_limit or 3)
    with arguments.main_process_first(local=False):
        if arguments.process_index == 0:
            open_run(directory, settings, needed, overwrite)
        checkpoint = last_complete_checkpoint(directory)
    arguments.eval_on_start = checkpoint is None and arguments.eval_strategy != "no"
    trainer = make_trainer(model, arguments, train_rows, eval_rows, callbacks)
    with out_of_memory_explained(arguments):
        output = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model.eval()
    refuse_unmoved(model)
    result = summarize(trainer, output, checkpoint)
    trainer.save_model(str(directory))
    if arguments.process_index == 0:
        record = {"settings": settings, "base": settings["base"], "finished": True, "result": result}
        write_json(directory / ADAPTER_RECORD, record)
        if card is not None:
            write_json(directory / ADAPTER_CARD, as_session_meta(card).model_dump())
    return result


def make_trainer(model, arguments, train_rows, eval_rows, callbacks) -> LoraTrainer:
    """A `LoraTrainer` that shows its progress, for a model whose only trainable part is its adapter."""
    plain = arguments.label_smoothing_factor or model.config._attn_implementation != "sdpa"  # see `share_prefix`
    trainer = LoraTrainer(
        model=model,
        args=arguments,
        data_collator=pad if plain else collate,
        train_dataset=fill_up(train_rows, arguments),
        eval_dataset=eval_rows,
        callbacks=[LiveCurve() if is_in_notebook() else LogLines(), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def fill_up(rows: list[dict], arguments: TrainingArguments) -> list[dict]:
    """`rows`, with empty ones added for several processes, until every process gets equally many in the last step.

    accelerate would fill up with rows from the beginning, which would then be learned twice.
    """
    if arguments.world_size == 1:
        return rows
    step = arguments.train_batch_size * arguments.world_size
    return rows + [FILLER] * (-len(rows) % step)


def describe_settings(model, train_rows, eval_rows, training: dict) -> dict:
    """What a run's result depends on: base, adapter, data and arguments. Two runs with the same may be joined."""
    lora = model.peft_config["default"]
    targets = lora.target_modules
    return {
        "base": base_fingerprint(model),
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "data": hashlib.sha256(json.dumps([train_rows, eval_rows]).encode()).hexdigest()[:16],
        "arguments": {name: value for name, value in training.items() if name not in NO_EFFECT_ON_RESULT},
    }


def summarize(trainer: Trainer, output, checkpoint: Path | None) -> dict:
    """The result of a run; see `finetune`."""
    state, metrics = trainer.state, output.metrics
    history = [
        {"step": entry["step"], **{name: entry[name] for name in ("loss", "eval_loss") if name in entry}}
        for entry in state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]
    held_out = [(entry["eval_loss"], entry["step"]) for entry in history if "eval_loss" in entry and entry["step"]]
    best_loss, best_step = min(held_out, default=(None, state.global_step))
    steps = state.global_step - (int(checkpoint.name.split("-")[1]) if checkpoint else 0)
    samples = steps * trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size
    return {
        "steps": state.global_step,
        "seconds": metrics["train_runtime"],
        "samples_per_second": samples / max(metrics["train_runtime"], 1e-9),
        "train_loss": next((entry["loss"] for entry in reversed(history) if "loss" in entry), None),
        "eval_loss": best_loss,
        "best_step": best_step,
        "resumed_from": state.global_step - steps if checkpoint else None,
        "history": history,
    }


@contextmanager
def out_of_memory_explained(arguments: TrainingArguments):
    """Turn an out-of-memory error, of a GPU or of the machine, into one that says which knobs to turn."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in text:
            raise
        raise FinetuneError(
            f"内存或显存不足 [out of memory]：{text.splitlines()[0][:200]}\n"
            f"按顺序试：per_device_train_batch_size={max(1, arguments.train_batch_size // 2)}（现在 {arguments.train_batch_size}），"
            f"同时 gradient_accumulation_steps={2 * arguments.gradient_accumulation_steps} 保持总批量；"
            f"gradient_checkpointing=True（现在 {arguments.activation_checkpointing}）；"
            "减小 max_length；quantization='nf4' 以 4 bit 加载底模"
        ) from error
