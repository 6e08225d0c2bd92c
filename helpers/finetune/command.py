"""`python -m helpers finetune`: from a model's name and a data file to an adapter."""

import os
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, set_seed

from ..errors import FinetuneError
from ..model.adapters import adapter_card, adapter_file
from ..model.loading import load, quantization_config, resolve_model
from ..paths import PROJECT_DIR, check_new_folder
from .arguments import check_arguments, describe_settings, training_arguments
from .checkpoints import check_folder
from .data import load_samples, read_card, replay_dialogues, split_samples
from .encoding import describe_lengths, encode_samples
from .evaluation import perplexity_before_and_after
from .lora import add_lora, lora_config, merge_adapter
from .training import check_adapter, continue_lora, finetune

DEFAULT_DATA = PROJECT_DIR / "data" / "lora" / "lu_zhishen.jsonl"
DEFAULT_CARD = PROJECT_DIR / "data" / "lora" / "lu_zhishen_card.json"


def run_finetune(
    model, data, card, output_dir, lora: dict, training: dict, *, adapter=None, replay=0, max_length=512,
    quantization=None, on_bad_row="skip", overwrite=False, merge_to=None,
) -> dict:  # fmt: skip
    """Check, read, load, train, report. What can be wrong is found before the model is loaded.

    Args:
        data: a file for `load_samples`; None: the shipped set, with its card.
        card: see `read_card`; None: every row brings its own persona, or has that of `adapter`.
        lora, training: arguments of `add_lora`, and fields of TrainingArguments.
        adapter: directory of an adapter to go on from, instead of a new one with `lora`.
        replay: how many dialogues of the shipped characters to mix in.
        merge_to: a new or empty folder for the merged model.
    """
    path = check_run(model, output_dir, lora, training, adapter, quantization, overwrite, merge_to)
    card = DEFAULT_CARD if data is None and card is None else card
    card = adapter and adapter_card(adapter) if card is None else read_card(card)
    samples, report = load_samples(data or DEFAULT_DATA, card, on_bad_row=on_bad_row)
    parts, tokenizer = split_samples(samples), AutoTokenizer.from_pretrained(path)
    train_rows, eval_rows = (encode_samples(tokenizer, part, max_length, report, on_bad_row) for part in parts)
    train_rows += encode_samples(tokenizer, replay_dialogues(replay), max_length) if replay else []
    main_process = int(os.environ.get("RANK", 0)) == 0  # the only one, unless `accelerate launch` has started several
    say = partial(print, flush=True) if main_process else (lambda text: None)
    say(
        f"{report}\n训练集 [training]：{describe_lengths(train_rows)}\n留出集 [held out]：{describe_lengths(eval_rows)}"
    )
    if adapter is None:  # else its own settings hold
        say(describe_settings(lora, training, replay))
    loaded, tokenizer = load(path, device_map=training_device(), quantization=quantization)
    set_seed(training.get("seed", 0))
    tuned = add_lora(loaded, **lora) if adapter is None else continue_lora(loaded, adapter)
    trainable, total = tuned.get_nb_trainable_parameters()
    say(f"可训练参数 [trainable]：{trainable:,} / {total:,}（{trainable / total:.2%}）")
    personas = {sample.card.model_dump_json() for sample in samples}
    persona = samples[0].card if len(personas) == 1 else None
    result = finetune(tuned, train_rows, eval_rows, output_dir, card=persona, overwrite=overwrite, **training)
    say(describe_result(tuned, eval_rows, output_dir))
    if merge_to is not None and main_process:
        say(f"合并后的模型 [merged model]：{merge_adapter(tuned, tokenizer, Path(merge_to))}")
    return result


def describe_result(tuned, eval_rows: list[dict], output_dir) -> str:
    """What was gained on the held-out rows, where the adapter is, and its size."""
    before, after = perplexity_before_and_after(tuned, eval_rows)
    size = adapter_file(Path(output_dir).expanduser()).stat().st_size / 1e6
    return f"留出集困惑度 [held-out perplexity]：{before:.1f} -> {after:.1f}。adapter 在 {output_dir}（{size:.2f} MB）"


def check_run(model, output_dir, lora, training, adapter, quantization, overwrite, merge_to) -> Path:
    """The directory of the model, if nothing that is known without data and weights stands in the way."""
    if merge_to is not None and quantization is not None:
        raise FinetuneError(
            "量化的底模不能合并 [cannot merge into a quantised base]：去掉 --merge-to，训练后以半精度重新加载再合并"
        )
    if adapter is None:
        lora_config(**lora)
    else:
        check_adapter(adapter)
    check_arguments(training)  # first: it might name the output_dir a second time
    training_arguments(None, output_dir, **training)
    if quantization is not None:
        quantization_config(quantization, torch.float32)
    path = resolve_model(model)
    directory = Path(output_dir).expanduser().absolute()
    if merge_to is not None:
        check_new_folder(Path(merge_to), path)
        if Path(merge_to).absolute() in [directory, *directory.parents]:  # not empty after training
            raise FinetuneError(
                f"adapter 和合并后的模型要放在两个目录 [one folder for two]：{directory}。请换一个 --merge-to"
            )
    check_folder(directory, overwrite)
    return path


def training_device():
    """The `device_map` to train on: one process uses one GPU, its own under `accelerate launch`."""
    return {"": int(os.environ.get("LOCAL_RANK", 0))} if torch.cuda.is_available() else "auto"
