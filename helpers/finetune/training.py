"""Training a LoRA adapter with transformers' Trainer, and failures that explain themselves."""

import hashlib
import json
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother, LengthGroupedSampler
from transformers.utils import is_in_notebook

from ..characters.personas import as_session_meta
from ..errors import FinetuneError
from ..model.adapters import ADAPTER_CARD, adapter_config, adapter_file, add_adapter, base_fingerprint
from ..paths import write_json
from .arguments import training_arguments
from .checkpoints import bytes_needed, close_run, last_complete_checkpoint, open_run, write_record
from .compat import OrderedTrainer, takes_any_mask, use_one_gpu
from .encoding import EMPTY_ROW, collate, pad
from .evaluation import summed_loss
from .lora import bare_base, check_moved
from .progress import LiveCurve, LogLines

NO_EFFECT_ON_RESULT = {"disable_tqdm", "eval_on_start"}


class EpochGroupedSampler(LengthGroupedSampler):
    """Groups rows of similar length, in an order that follows from seed and epoch alone.

    transformers' own sampler draws from torch's global random numbers: processes would disagree on the order, and a
    resumed epoch would not have the order it began with.

    Args:
        batch_size: rows of one training step, over all processes.
        empty: how many rows come behind the others, to fill up the last step.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int, empty: int = 0):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.empty, self.epoch = seed, empty, 0

    def __len__(self):
        return len(self.lengths) + self.empty

    def set_epoch(self, epoch: int) -> None:  # called by accelerate before every epoch
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        return iter([*super().__iter__(), *range(len(self.lengths), len(self))])


class LoraTrainer(OrderedTrainer):
    """transformers' Trainer with a repeatable order, an exact held-out loss, and a stop at the first NaN."""

    @property
    def train_sampler(self):
        args, rows = self.args, self.train_dataset
        if args.train_sampling_strategy != "group_by_length":
            return None  # transformers' order
        lengths = [len(row["input_ids"]) for row in rows if row is not EMPTY_ROW]
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return EpochGroupedSampler(step, lengths, seed, empty=len(rows) - len(lengths))

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):  # the weights are still as they were
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
        sums = torch.tensor(summed_loss(self.model, rows, self.args.eval_batch_size), device=self.args.device)
        total, count = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": total / count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def continue_lora(model, adapter):
    """`model` with the LoRA adapter in directory `adapter`, to be trained on: targets, r and alpha stay its own.

    As for `add_lora`, an adapter that is there already is taken off, and a quantised model is prepared for training.

    Raises:
        CheckpointError: it is not whole, or not for this base; FinetuneError: not LoRA.
    """
    file = check_adapter(adapter)
    tuned = add_adapter(bare_base(model), adapter, trainable=True)
    tuned.continued_from = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return tuned


def check_adapter(adapter) -> Path:
    """The weight file of an adapter that training can go on from, as far as can be told without its base."""
    if (kind := adapter_config(Path(adapter)).get("peft_type")) != "LORA":
        raise FinetuneError(f"只能接着训练 LoRA 的 adapter [not LoRA]：{adapter} 是 {kind}。请去掉 adapter，从头训练")
    return adapter_file(Path(adapter))


def finetune(model, train_rows, eval_rows, output_dir, *, card=None, overwrite=False, callbacks=(), **training) -> dict:
    """Train the adapter of `model` (see `add_lora`, `continue_lora`) and keep the one with the lowest held-out loss in `output_dir`.

    A run that was interrupted goes on from its last complete checkpoint if it is started again with the same settings.

    Args:
        card: the persona that the adapter speaks as; kept beside it, so that the API server can use it.
        overwrite: replace a finished run, or one with other settings, as soon as this one is complete.
        callbacks, **training: for the Trainer, and fields of its TrainingArguments.

    Returns:
        See `summarize`. The model is left in evaluation mode.

    Raises:
        FinetuneError: before training (arguments, folder, disk), within (no finite loss, no memory) or after (no change).
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
    with out_of_memory_explained(arguments), interruption_explained(arguments):
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
    targets, continued_from = lora.target_modules, getattr(model, "continued_from", None)
    return {
        **({"continued_from": continued_from} if continued_from else {}),
        "base": base_fingerprint(model),
        **{name: getattr(lora, name) for name in ("r", "lora_alpha", "lora_dropout")},
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
def interruption_explained(arguments: TrainingArguments):
    """After Ctrl-C, say what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if arguments.process_index == 0:
            checkpoint = last_complete_checkpoint(Path(arguments.output_dir))
            kept = f"{checkpoint} 留着，用同样的设置再运行一次，就从那一步接着训练"
            print(
                f"训练中断了 [interrupted]：{kept if checkpoint else '还没有 checkpoint，再运行一次会从头开始'}",
                flush=True,
            )
        raise


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
