"""Talking to a character, in a terminal or on a web page."""

from typing import Annotated

import typer

from .options import Adapter, Compile, Host, ModelName, Password, Port, Proxy, Quantization

GENERATION = ("seed", "temperature", "top_p", "repetition_penalty", "max_new_tokens", "max_length", "do_sample")


def chat(
    model: ModelName = "auto",
    character: Annotated[
        str | None, typer.Option(help="和谁聊，默认 adapter 自己的角色，没有就是苏梦远 [character]")
    ] = None,
    adapter: Adapter = None,
    quantization: Quantization = None,
    compile: Compile = False,
    load: Annotated[str | None, typer.Option(metavar="FILE", help="打开导出的对话或角色卡 [open a file]")] = None,
    once: Annotated[str | None, typer.Option(metavar="TEXT", help="只答这一句，打印后退出 [answer once]")] = None,
    seed: Annotated[int | None, typer.Option(help="让采样可以重复 [repeatable sampling]")] = None,
    temperature: Annotated[float | None, typer.Option(help="越大越随意 [flatter above 1]")] = None,
    top_p: Annotated[float | None, typer.Option(help="只在最可能的部分里采样 [nucleus]")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="大于 1 减少重复 [above 1: less]")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="回复最多几个 token [longest reply]")] = None,
    max_length: Annotated[int | None, typer.Option(help="prompt 加回复最多几个 token [both together]")] = None,
    do_sample: Annotated[bool | None, typer.Option(help="--no-do-sample：总取最可能的词 [greedy]")] = None,
) -> None:
    """在终端里聊天；输入来自管道时一行一句 [chat; in a pipe, one message a line]"""
    given = dict(locals())
    from ..demo.terminal import start

    generation = {name: given[name] for name in GENERATION if given[name] is not None}
    loading = {"adapter": adapter, "quantization": quantization, "compile": compile}
    start(model, character, file=load, once=once, loading=loading, **generation)


def demo(
    model: ModelName = "auto",
    adapter: Adapter = None,
    quantization: Quantization = None,
    compile: Compile = False,
    host: Host = "127.0.0.1",
    port: Port = 6006,
    password: Password = None,
    insecure: Annotated[bool, typer.Option(help="没有密码也绑定 127.0.0.1 以外的地址 [no login needed]")] = False,
    proxy: Proxy = None,
    language: Annotated[str, typer.Option(help="页面的语言，zh 或 en [language]")] = "zh",
) -> None:
    """聊天网页 [web page]"""
    from ..demo.web import serve

    loading = {"adapter": adapter, "quantization": quantization, "compile": compile}
    options = {"password": password, "insecure": insecure, "proxy": proxy, "language": language}
    serve(model, loading, host=host, port=port, **options)
