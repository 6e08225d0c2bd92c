"""The API server."""

from typing import Annotated

import typer

from .options import Host, ModelName, Password, Port, Proxy

ApiKey = Annotated[str | None, typer.Option(envvar="CHARACTERGLM_API_KEY", help="访问要带的 key [bearer token]")]
Adapters = Annotated[list[str] | None, typer.Option(metavar="NAME=DIR", help="LoRA adapter，可重复 [repeatable]")]
MaxReplicas = Annotated[int | None, typer.Option(min=1, help="忙的时候最多几个副本 [most copies, under load]")]
Gpus = Annotated[float | None, typer.Option(min=0, help="每个副本几块 GPU，0.5 是两个共用一块 [GPUs a copy]")]
RayAddress = Annotated[
    str | None, typer.Option(metavar="ADDR", help="已有的 Ray 集群，auto 是本机所在的 [a running cluster]")
]
ONE_COPY = {"replicas": 1, "max_replicas": None, "gpus_per_replica": None, "ray_address": None}


def serve(
    model: ModelName = "auto",
    host: Host = "127.0.0.1",
    port: Port = 6006,
    api_key: ApiKey = None,
    adapter: Adapters = None,
    insecure: Annotated[bool, typer.Option(help="没有 key 也绑定 127.0.0.1 以外的地址 [no key needed]")] = False,
    served_model_name: Annotated[
        str | None, typer.Option(help="请求里也可以这样叫这个模型；characterglm 总是可以 [one more name]")
    ] = None,
    proxy: Proxy = None,
    cors_origin: Annotated[list[str] | None, typer.Option(help="允许哪些网页调用，可重复 [repeatable]")] = None,
    slots: Annotated[int, typer.Option(min=1, max=256, help="同时写多少条回复 [replies at once]")] = 16,
    queue_size: Annotated[int, typer.Option(min=0, help="再多少条排队，更多的得到 429 [waiting requests]")] = 48,
    context: Annotated[int, typer.Option(min=64, help="prompt 加回复最多多少 token [tokens]")] = 4096,
    cache_tokens: Annotated[int, typer.Option(min=64, help="KV cache 的大小，所有回复共用 [tokens]")] = 32768,
    grace_seconds: Annotated[int, typer.Option(min=0, help="停止时等正在写的回复多久 [seconds]")] = 30,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU 线程数，默认留一个核给网络 [CPU threads]")] = None,
    log_text: Annotated[bool, typer.Option(help="日志里也写对话内容 [log messages too]")] = False,
    page: Annotated[bool, typer.Option(help="同一个模型在 /demo 提供聊天网页 [chat page at /demo]")] = False,
    password: Password = None,
    replicas: Annotated[int, typer.Option(min=1, help="模型的副本数，多于 1 个要装 Ray [copies of the model]")] = 1,
    max_replicas: MaxReplicas = None,
    gpus_per_replica: Gpus = None,
    ray_address: RayAddress = None,
    until_stdin_closes: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """API 服务：原教程的 POST / 和 OpenAI 接口 [API server]"""
    options = dict(locals())  # most have the names that the server gives them
    from ..serving import serve as serve_api

    cluster = {name: options.pop(name) for name in ONE_COPY}
    del options["adapter"], options["cors_origin"], options["page"], options["password"]
    serve_api(
        **options,
        cluster=None if cluster == ONE_COPY else cluster,
        add_page=_mounting(host, password, insecure) if page else None,
        adapters=dict(map(_name_and_folder, adapter or [])),
        cors_origins=tuple(cors_origin or ()),
    )


def _mounting(host: str, password: str | None, insecure: bool):
    from ..demo.web import check_password, mount

    check_password(host, password, insecure)
    return lambda app, loaded: mount(app, *loaded, password=password)


def _name_and_folder(adapter: str) -> tuple[str, str]:
    name, _, folder = adapter.partition("=")
    if not name or not folder:
        raise typer.BadParameter("写法是 --adapter NAME=DIR [takes a name and a value]", param_hint="--adapter")
    return name, folder
