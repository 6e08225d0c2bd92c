"""Copies of a model for other programs."""

from typing import Annotated

import typer


def convert(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="放副本的新目录 [new folder for the copy]")],
    model: Annotated[str, typer.Option(help="6b、nano 或模型目录 [or a folder]")] = "6b",
    adapter: Annotated[
        str | None,
        typer.Option(metavar="OLD", help="改为转换这个原版代码的 LoRA adapter [adapter of the original code]"),
    ] = None,
) -> None:
    """把 .bin 权重另存一份 safetensors，可选 [optional safetensors copy]；load 不需要它，只读 safetensors 的工具需要"""
    if adapter is not None:
        from ..export.original_adapter import convert_adapter

        convert_adapter(model, adapter, directory)
        return
    from ..export.safetensors_copy import convert_checkpoint

    convert_checkpoint(model, directory)


def export(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="放导出结果的新目录，或 .gguf 文件 [new folder or file]")
    ],
    model: Annotated[str, typer.Option(help="6b、nano 或模型目录 [or a folder]")] = "6b",
    adapter: Annotated[str | None, typer.Option(help="合并进权重的 LoRA adapter 的目录 [LoRA to merge]")] = None,
    dtype: Annotated[
        str, typer.Option(help="auto（和原文件相同）、float32、float16、bfloat16 [auto: as stored]")
    ] = "auto",
    gguf: Annotated[
        str | None, typer.Option(help="写成 llama.cpp 的一个文件：bf16、f16、q8_0 或 f32 [one GGUF file]")
    ] = None,
    adapter_gguf: Annotated[
        bool, typer.Option("--adapter-gguf", help="只写 adapter，给 llama-server --lora [the adapter alone]")
    ] = False,
) -> None:
    """导出成标准的 GlmForCausalLM 目录，给 vLLM 等程序用；或 GGUF 文件，给 llama.cpp [for vLLM, llama.cpp and others]"""
    if (gguf or adapter_gguf) and dtype != "auto":
        raise typer.BadParameter("GGUF 的精度由 --gguf 决定 [dtype is for folders]", param_hint="--dtype")
    if adapter_gguf and (gguf or not adapter):
        raise typer.BadParameter("要有 --adapter，不要 --gguf [adapter alone]", param_hint="--adapter-gguf")
    _export(target, model, adapter, dtype, gguf, adapter_gguf)


def _export(target: str, model: str, adapter: str | None, dtype: str, gguf: str | None, adapter_gguf: bool) -> None:
    if adapter_gguf:
        from ..export.gguf_adapter import export_adapter

        export_adapter(model, adapter, target)
    elif gguf:
        from ..export.gguf import export_gguf

        export_gguf(model, target, kind=gguf, adapter=adapter)
    else:
        from ..export.plain import export_model

        export_model(model, target, adapter=adapter, dtype=dtype)
