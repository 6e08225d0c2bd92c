"""Training a LoRA adapter with transformers' Trainer: sensible defaults, and failures that explain themselves."""

import dataclasses
import hashlib
import json
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, get_type_hints

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_pt_utils import LabelSmoother, LengthGroupedSampler
from transformers.utils import is_in_notebook

from ..characters.personas import as_session_meta
from ..errors import FinetuneError, did_you_mean
from ..model.adapters import ADAPTER_CARD, base_fingerprint
from ..paths import write_json
from .checkpoints import bytes_needed, close_run, last_complete_checkpoint, open_run, write_record
from .compat import OrderedTrainer, takes_any_mask, use_one_gpu
from .encoding import EMPTY_ROW, collate, pad
from .evaluation import summed_loss
from .lora import check_moved
from .progress import LiveCurve, LogLines

LARGE_MODEL_PARAMETERS = 1e9
DEFAULTS = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
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
    "logging_nan_inf_filter": False,  # it would hide a NaN loss
    "remove_unused_columns": False,
    "ddp_find_unused_parameters": False,  # every adapter takes part in every step
    "report_to": "none",
    "seed": 0,
}
# transformers 5 renamed these; the old names are known better, and would lose against a default under the new one.
NEW_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# Older lessons have these, which transformers 5 knows no more.
GONE = {
    "evaluation_strategy": "eval_strategy",
    "group_by_length": "train_sampling_strategy=group_by_length",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "warmup_ratio": "warmup_steps",  # below 1: a share
}
AT_LEAST_ONE = {"per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"}
NO_EFFECT_ON_RESULT = {"disable_tqdm", "eval_on_start"}


def training_arguments(model, output_dir, **chosen) -> TrainingArguments:
    """transformers' TrainingArguments with defaults for a LoRA adapter; any field can be `chosen`.

    Learning rate, half precision and checkpointing follow from the model; None, if what is chosen is only to be checked
    before a model is loaded.

    Raises:
        FinetuneError: an unknown field (with the closest known one), or values that make no sense.
    """
    on_cpu, on_gpu = (model is not None and model.device.type == kind for kind in ("cpu", "cuda"))
    large = model is not None and model.num_parameters() > LARGE_MODEL_PARAMETERS
    of_model = {
        "learning_rate": 2e-4 if large else 4e-3,  # usual for billions; Nano needs, and bears, twenty times that
        "bf16": on_gpu and model.dtype == torch.bfloat16,
        "fp16": on_gpu and model.dtype == torch.float16,
        "activation_checkpointing": on_gpu and large,
        "dataloader_pin_memory": on_gpu,
        "use_cpu": on_cpu,
        "disable_tqdm": not is_in_notebook(),
    }
    options = DEFAULTS | of_model | check_arguments(chosen)
    try:
        arguments = TrainingArguments(output_dir=str(output_dir), **options)
        for reporter in get_reporting_integration_callbacks(arguments.report_to):
            reporter()  # raises if its package is missing
    except (ValueError, TypeError, NotImplementedError, ImportError, RuntimeError) as error:
        raise FinetuneError(f"训练参数没有意义 [invalid training argument]：{error}") from None
    return arguments


def check_arguments(chosen: dict) -> dict:
    """`chosen` in the types of the fields of TrainingArguments: for a bool, "false" is False.

    Raises:
        FinetuneError: no such field, not a value for it, not a number, or 0 where 1 is the least.
    """
    kinds = get_type_hints(TrainingArguments)
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init} - {"output_dir"}
    config = ConfigDict(allow_inf_nan=False, coerce_numbers_to_str=True)
    typed = {}
    for name, value in chosen.items():
        if name not in known:
            hint = f"现在是 {GONE[name]} [did you mean]" if name in GONE else did_you_mean(name, known)
            raise FinetuneError(f"TrainingArguments 没有参数 {name} [unknown training argument]。{hint}")
        kind = Annotated[kinds[name], Field(ge=1)] if name in AT_LEAST_ONE else kinds[name]
        try:
            typed[NEW_NAMES.get(name, name)] = TypeAdapter(kind, config=config).validate_python(value)
        except ValidationError as error:
            why = error.errors()[0]["msg"]
            raise FinetuneError(f"训练参数没有意义 [invalid training argument]：{name}={value!r}，{why}") from None
    return typed


class EpochGroupedSampler(LengthGroupedSampler):
    """Groups rows of similar length, in an order that follows from seed and epoch alone.

    transformers' own sampler draws from torch's global random numbers: processes would disagree on the order, and a
    resumed epoch would not have the order it began with.

    Args:
        batch_size: rows of one training step, over all processes.
        empty: how many rows behind the others fill up the last step; they always come last.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int, empty: int = 0):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.empty, self.epoch = seed, empty, 0

    def __len__(self):
        return len(self.lengths) + self.empty

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before every epoch."""
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        return iter([*super().__iter__(), *range(len(self.lengths), len(self))])


class LoraTrainer(OrderedTrainer):
    """transformers' Trainer with a repeatable order, an exact held-out loss, and a stop at the first NaN."""

    @property
    def train_sampler(self):
        """The order of the training rows; None for another than the default strategy."""
        args, rows = self.args, self.train_dataset
        if args.train_sampling_strategy != "group_by_length":
            return None
        lengths = [len(row["input_ids"]) for row in rows if row is not EMPTY_ROW]
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return EpochGroupedSampler(step, lengths, seed, empty=len(rows) - len(lengths))

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
        """The mean loss of a held-out token, without label smoothing.

        transformers would average over batches, so that a token of a batch with short replies counts for more.
        """
        rows = (eval_dataset or self.eval_dataset)[self.args.process_index :: self.args.world_size]
        sums = torch.tensor(summed_loss(self.model, rows, self.args.eval_batch_size), dtype=torch.float64)
        total, count = self.accelerator.reduce(sums.to(torch.float32).to(self.args.device), "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": total / count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def finetune(
    model, train_rows, eval_rows, output_dir, *, card=None, overwrite=False, callbacks=(), **training
) -> dict:
    """Train the adapter of `model` (see `add_lora`) and keep the one with the lowest held-out loss in `output_dir`.

    A run that was interrupted goes on from its last complete checkpoint if it is started again with the same settings.

    Args:
        card: the persona that the adapter speaks as; kept beside it, so that the API server can use it.
        overwrite: replace a finished run, or one with other settings, as soon as this one is complete.
        callbacks, **training: for the Trainer, and fields of its TrainingArguments.

    Returns:
        See `summarize`. The model is left in evaluation mode.

    Raises:
        FinetuneError: senseless arguments, a folder that is taken, not writable or too full; then a loss that is not
            finite, or out of memory; in the end an adapter that has not changed.
    """
    directory = Path(output_dir).expanduser().absolute()
    arguments = training_arguments(model, directory, **training)
    use_one_gpu(arguments)
    settings = describe_settings(model, train_rows, eval_rows, training, arguments.world_size)
    needed = bytes_needed(model.num_parameters(only_trainable=True), arguments.save_total_limit or 3)
    with arguments.main_process_first(local=False):  # the others find what the first has made
        run = open_run(directory, settings, needed, overwrite)
        checkpoint = last_complete_checkpoint(run)
    arguments.output_dir = str(run)
    arguments.eval_on_start = checkpoint is None and arguments.eval_strategy != "no"
    trainer = make_trainer(model, arguments, train_rows, eval_rows, callbacks)
    with out_of_memory_explained(arguments):
        output = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    model.eval()
    check_moved(model)
    result = summarize(trainer, output.metrics["train_runtime"], checkpoint)
    trainer.save_model(str(run))
    if arguments.process_index == 0:
        write_record(run, settings, result)
        if card is not None:
            write_json(run / ADAPTER_CARD, as_session_meta(card).model_dump())
        close_run(directory, run)
    return result


def make_trainer(model, arguments, train_rows, eval_rows, callbacks) -> LoraTrainer:
    """A `LoraTrainer` that shows its progress, for a model whose only trainable part is its adapter."""
    # accelerate would fill up the last step with rows from the beginning, which would then be learned twice.
    step = arguments.train_batch_size * arguments.world_size
    empty = [EMPTY_ROW] * (-len(train_rows) % step) if arguments.world_size > 1 else []
    smoothing = arguments.label_smoothing_factor
    trainer = LoraTrainer(
        model=model,
        args=arguments,
        data_collator=collate if takes_any_mask(model) else pad,
        train_dataset=train_rows + empty,
        eval_dataset=eval_rows,
        callbacks=[LiveCurve() if is_in_notebook() else LogLines(), *callbacks],
        # Given explicitly: left to itself, the Trainer decides by the name of the model's class whether labels and
        # logits face each other already. Ours do; see `shift_labels` in `pack` and `pad`.
        compute_loss_func=LabelSmoother(epsilon=smoothing) if smoothing else None,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def describe_settings(model, train_rows, eval_rows, training: dict, processes: int) -> dict:
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
        "processes": processes,  # each takes a batch of its own
    }


def summarize(trainer: Trainer, seconds: float, checkpoint: Path | None) -> dict:
    """`steps`, `seconds` and `samples_per_second` of this call; the last `train_loss`, the lowest `eval_loss` and its
    `best_step`; `resumed_from`, a step or None; `history`, what was logged.
    """
    state, args = trainer.state, trainer.args
    kept = ("step", "loss", "eval_loss")
    history = [{name: entry[name] for name in kept if name in entry} for entry in state.log_history]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    held_out = [(entry["eval_loss"], entry["step"]) for entry in history if "eval_loss" in entry and entry["step"]]
    best_loss, best_step = min(held_out, default=(None, state.global_step))
    resumed_from = int(checkpoint.name.split("-")[1]) if checkpoint else None
    rows_a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "steps": state.global_step,
        "seconds": seconds,
        "samples_per_second": (state.global_step - (resumed_from or 0)) * rows_a_step / seconds,
        "train_loss": losses[-1] if losses else None,
        "eval_loss": best_loss,
        "best_step": best_step,
        "resumed_from": resumed_from,
        "history": [entry for entry in history if len(entry) > 1],
    }


@contextmanager
def out_of_memory_explained(arguments: TrainingArguments):
    """Turn an out-of-memory error, of a GPU or of the machine, into one that says which knobs to turn."""
    try:
        yield
    except RuntimeError as error:
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
