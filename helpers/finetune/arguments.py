"""The arguments of a training run: defaults for a LoRA adapter, and checks that need no model."""

import dataclasses
from typing import Annotated, get_type_hints

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import is_in_notebook

from ..errors import FinetuneError, did_you_mean

# What a run does unless it is told otherwise stands here. train.py takes it from here; the options of the command and the
# parameters of notebook 04 repeat it, where their readers look for it, and a test compares them.
LORA_DEFAULTS = {"targets": "all-linear", "r": 8, "alpha": 32, "dropout": 0.1}
REPLAY = 50  # dialogues of other characters
LARGE_MODEL_PARAMETERS = 1e9
LEARNING_RATES = {"large": 2e-4, "small": 4e-3}  # usual for billions; Nano needs, and bears, twenty times that
DEFAULTS = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
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
# What the command calls some fields.
SHORT_NAMES = {
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "learning_rate": "learning_rate",
}
# transformers 5 renamed these; the old names are known better, and would lose against a default under the new one.
NEW_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# Old names that are not like the new ones, to be hinted at.
GONE = {
    "group_by_length": "train_sampling_strategy=group_by_length",
    "no_cuda": "use_cpu",
    "overwrite_output_dir": "overwrite",
}
AT_LEAST_ONE = {"per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"}


def training_arguments(model, output_dir, **chosen) -> TrainingArguments:
    """transformers' TrainingArguments with defaults for a LoRA adapter; any field can be `chosen`.

    Learning rate, half precision and checkpointing follow from the model; None, if what is chosen is only to be checked
    before a model is loaded.

    Raises:
        FinetuneError: an unknown field, or values that make no sense.
    """
    on_cpu, on_gpu = (model is not None and model.device.type == kind for kind in ("cpu", "cuda"))
    of_model = {
        "learning_rate": default_learning_rate(model),
        "bf16": on_gpu and model.dtype == torch.bfloat16,
        "fp16": on_gpu and model.dtype == torch.float16,
        "activation_checkpointing": on_gpu and is_large(model),
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


def is_large(model) -> bool:
    return model is not None and model.num_parameters() > LARGE_MODEL_PARAMETERS


def default_learning_rate(model) -> float:
    return LEARNING_RATES["large" if is_large(model) else "small"]


def default_settings() -> dict:
    """The defaults that a learner turns, by the names of the command's options; to be printed before a run."""
    rates = f"{LEARNING_RATES['small']:g}，10 亿参数以上 {LEARNING_RATES['large']:g}"
    training = {name: DEFAULTS.get(field, rates) for name, field in SHORT_NAMES.items()}
    return {**LORA_DEFAULTS, **training, "replay": REPLAY}


def describe_settings(lora: dict, training: dict, replay: int) -> str:
    """One line with the settings of a run: the defaults, and what was chosen instead."""
    chosen = {name: training[field] for name, field in SHORT_NAMES.items() if field in training}
    settings = default_settings() | lora | chosen | {"replay": replay}
    return "设置 [settings]：" + "，".join(f"{name} {value}" for name, value in settings.items())


def check_arguments(chosen: dict) -> dict:
    """`chosen` in the types of the fields of TrainingArguments: for a bool, "false" is False. Raises as above."""
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
