"""The API server."""

from typing import Annotated

import typer

from .options import ModelName, split_pairs


def serve(
    model: ModelName = "auto",
    host: Annotated[str, typer.Option(help="绑定的地址 [address to bind]")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="端口；AutoDL 可以对外开放 6006 [port]")] = 6006,
    api_key: Annotated[
        str | None, typer.Option(envvar="CHARACTERGLM_API_KEY", help="访问要带的 key [bearer token]")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="LoRA adapter，可重复 [repeatable]")
    ] = None,
    insecure: Annotated[bool, typer.Option(help="没有 key 也绑定 127.0.0.1 以外的地址 [no key needed]")] = False,
    cors_origin: Annotated[list[str] | None, typer.Option(help="允许哪些网页调用，可重复 [repeatable]")] = None,
    slots: Annotated[int, typer.Option(min=1, max=256, help="同时写多少条回复 [replies at once]")] = 16,
    queue_size: Annotated[int, typer.Option(min=0, help="再多少条排队，更多的得到 429 [waiting requests]")] = 48,
    context: Annotated[int, typer.Option(min=64, help="prompt 加回复最多多少 token [tokens]")] = 4096,
    cache_tokens: Annotated[int, typer.Option(min=64, help="KV cache 的大小，所有回复共用 [tokens]")] = 32768,
    grace_seconds: Annotated[int, typer.Option(min=0, help="停止时等正在写的回复多久 [seconds]")] = 30,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU 线程数，默认留一个核给网络 [CPU threads]")] = None,
    log_text: Annotated[bool, typer.Option(help="日志里也写对话内容 [log messages too]")] = False,
    page: Annotated[bool, typer.Option(help="同一个模型在 /demo 提供聊天网页 [chat page at /demo]")] = False,
    password: Annotated[
        str | None,
        typer.Option(metavar="USER:PASSWORD", envvar="CHARACTERGLM_DEMO_PASSWORD", help="进入网页要的密码 [login]"),
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="模型的副本数，多于 1 个要装 Ray [copies of the model]")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="忙的时候最多几个副本 [most copies, under load]")
    ] = None,
    gpus_per_replica: Annotated[
        float | None, typer.Option(min=0, help="每个副本几块 GPU，0.5 是两个共用一块 [GPUs a copy]")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(metavar="ADDR", help="已有的 Ray 集群，auto 是本机所在的 [a running cluster]")
    ] = None,
    until_stdin_closes: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """API 服务：原教程的 POST / 和 OpenAI 接口 [API server]"""
    from ..serving import serve as serve_api

    add_page = None
    if page:
        from ..demo.web import check_password, mount

        check_password(host, password, insecure)

        def add_page(app, loaded):
            return mount(app, *loaded, password=password)

    cluster = {"replicas": replicas, "max_replicas": max_replicas}
    cluster |= {"gpus_per_replica": gpus_per_replica, "ray_address": ray_address}
    alone = {"replicas": 1, "max_replicas": None, "gpus_per_replica": None, "ray_address": None}
    serve_api(
        model,
        host=host,
        port=port,
        api_key=api_key,
        insecure=insecure,
        grace_seconds=grace_seconds,
        threads=threads,
        until_stdin_closes=until_stdin_closes,
        cluster=None if cluster == alone else cluster,
        add_page=add_page,
        adapters=dict(split_pairs(adapter, "--adapter NAME=DIR")),
        cors_origins=tuple(cors_origin or ()),
        slots=slots,
        queue_size=queue_size,
        context=context,
        cache_tokens=cache_tokens,
        log_text=log_text,
    )
