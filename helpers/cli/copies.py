"""Copies of a model for other programs."""

from typing import Annotated

import typer


def convert(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="放副本的新目录 [new folder for the copy]")],
    model: Annotated[str, typer.Option(help="6b、nano 或模型目录 [or a folder]")] = "6b",
) -> None:
    """把 .bin 权重另存一份 safetensors，可选 [optional safetensors copy]；load 不需要它，只读 safetensors 的工具需要"""
    from ..export.safetensors_copy import convert_checkpoint

    convert_checkpoint(model, directory)


def export(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="放导出结果的新目录 [new folder]")],
    model: Annotated[str, typer.Option(help="6b、nano 或模型目录 [or a folder]")] = "6b",
    adapter: Annotated[str | None, typer.Option(help="合并进权重的 LoRA adapter 的目录 [LoRA to merge]")] = None,
    dtype: Annotated[
        str, typer.Option(help="auto（和原文件相同）、float32、float16、bfloat16 [auto: as stored]")
    ] = "auto",
) -> None:
    """导出成标准的 GlmForCausalLM 目录，给 vLLM 等程序用 [plain folder for vLLM and others]"""
    from ..export.plain import export_model

    export_model(model, directory, adapter=adapter, dtype=dtype)
