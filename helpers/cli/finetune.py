"""LoRA fine-tuning."""

from typing import Annotated

import typer

from .options import PAIR, ModelName, Pairs, refuse_together, typed


def finetune(
    context: typer.Context,
    model: ModelName = "auto",
    data: Annotated[str | None, typer.Option(help="JSON 或 JSONL 数据，默认鲁智深 [training data]")] = None,
    card: Annotated[str | None, typer.Option(help="角色名，或人设的 JSON 文件 [persona: name or file]")] = None,
    adapter: Annotated[str | None, typer.Option(metavar="DIR", help="接着训练这个 adapter [go on from it]")] = None,
    output_dir: Annotated[str, typer.Option(help="adapter 和 checkpoint 的目录 [where they go]")] = "outputs/lora",
    epochs: Annotated[float, typer.Option(min=0, help="训练几遍 [passes over the data]")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="每步几条，每个进程 [per device]")] = 8,
    learning_rate: Annotated[float | None, typer.Option(help="默认按模型大小选 [default: by size]")] = None,
    targets: Annotated[str, typer.Option(help="qkv、qv、all-linear [layers with an adapter]")] = "all-linear",
    rank: Annotated[int, typer.Option(help="LoRA 的 r [rank]")] = 8,
    alpha: Annotated[int, typer.Option(help="LoRA 的 alpha")] = 32,
    dropout: Annotated[float, typer.Option(help="LoRA 的 dropout")] = 0.1,
    replay: Annotated[int, typer.Option(min=0, help="混入几段其他角色的对话 [against forgetting]")] = 50,
    max_length: Annotated[int, typer.Option(help="一条样本最多多少 token [tokens per sample]")] = 512,
    quantization: Annotated[str | None, typer.Option(help="nf4：4 bit QLoRA；int8 [quantised base]")] = None,
    on_bad_row: Annotated[str, typer.Option(help="skip 跳过坏行，raise 停下 [bad rows]")] = "skip",
    seed: Annotated[int, typer.Option(min=0, help="随机种子 [random seed]")] = 0,
    overwrite: Annotated[bool, typer.Option(help="删掉目录里已有的训练 [delete an earlier run]")] = False,
    merge_to: Annotated[str | None, typer.Option(help="另存合并后的完整模型 [save the merged model]")] = None,
    set_: Annotated[
        Pairs, typer.Option("--set", **PAIR, help="TrainingArguments 的任何字段，可重复 [repeatable]")
    ] = None,
) -> None:
    """LoRA 微调 [LoRA fine-tuning]；被中断后用同样的命令接着训练"""
    from ..finetune.command import run_finetune

    training = {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size,
        "seed": seed,
        **({} if learning_rate is None else {"learning_rate": learning_rate}),
        **typed(set_),
    }
    lora = {"targets": targets, "r": rank, "alpha": alpha, "dropout": dropout}
    options = {"replay": replay, "max_length": max_length, "quantization": quantization, "on_bad_row": on_bad_row}
    refuse_together(context, "adapter", "targets", "rank", "alpha", "dropout")
    options |= {"adapter": adapter, "overwrite": overwrite, "merge_to": merge_to}
    run_finetune(model, data, card, output_dir, lora, training, **options)
