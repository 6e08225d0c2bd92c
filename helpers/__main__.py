"""The command line: `python -m helpers COMMAND`. Each command imports what it needs only when it runs."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from .errors import HelpersError

app = typer.Typer(
    help="CharacterGLM-6B：运行 notebook、聊天、服务、微调、下载与体检、转换与导出 "
    "[run, chat, serve, finetune, download, doctor, convert, export]",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # would swallow the words in brackets
    pretty_exceptions_enable=False,
)

Numbers = Annotated[list[str] | None, typer.Argument(metavar="[01 02 ...]", help="notebook 编号，默认全部 [all]")]
ModelName = Annotated[str, typer.Option(help="auto、nano、6b 或模型目录 [or a folder]")]
Adapter = Annotated[str | None, typer.Option(help="LoRA adapter 的目录 [folder of a LoRA adapter]")]
Quantization = Annotated[str | None, typer.Option(help="int8 或 nf4：权重省一半或更多 [smaller weights]")]
Compile = Annotated[bool, typer.Option("--compile", help="编译，第一条回复慢，之后更快 [torch.compile]")]
OutputDir = Annotated[str, typer.Option(help="已执行的 notebook、回执和 run.json 的目录 [where outputs go]")]
Receipt = Annotated[str, typer.Argument(help="receipt_NN.json")]


class PairCommand(TyperCommand):
    """Takes `-p NAME VALUE` (as papermill) and `--set NAME VALUE`, joined to one word first: Typer has no list of pairs."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Parse after turning every `-p NAME VALUE` into `-p NAME=VALUE`."""
        return super().parse_args(ctx, join_pairs(args))


def join_pairs(args: list[str]) -> list[str]:
    """`args` with the two words after -p, --parameter or --set made one; `-p NAME=VALUE` is left as it is."""
    joined: list[str] = []
    words = iter(args)
    for word in words:
        joined.append(word)
        if word in ("-p", "--parameter", "--set"):
            name = next(words, None)
            value = next(words, None) if name and "=" not in name else None
            joined += [] if name is None else [name if value is None else f"{name}={value}"]
    return joined


def split_pairs(pairs: list[str] | None, usage: str = "-p NAME VALUE") -> list[tuple[str, str]]:
    """(name, value) of every NAME=VALUE; bad usage if the value is missing."""
    split = [pair.partition("=") for pair in pairs or []]
    for name, equals, _ in split:
        if not name or not equals:
            raise typer.BadParameter(f"写法是 {usage} [takes a name and a value]", param_hint=usage.split()[0])
    return [(name, value) for name, _, value in split]


@app.command(cls=PairCommand)
def run(
    notebooks: Numbers = None,
    model: ModelName = "auto",
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", metavar="NAME VALUE", help="notebook 参数，可重复 [repeatable]"),
    ] = None,
    output_dir: OutputDir = "outputs",
) -> None:
    """无界面运行 notebook [run the notebooks headless]"""
    from .runner import parse_parameters, print_summary, run_notebooks

    parameters = parse_parameters(split_pairs(parameter))
    results = run_notebooks(notebooks or [], model=model, parameters=parameters, output_dir=output_dir)
    print_summary(results, output_dir)
    raise typer.Exit(int(any(result.status != "ok" for result in results)))


@app.command()
def refresh(notebooks: Numbers = None, output_dir: OutputDir = "outputs") -> None:
    """在 Nano 上重跑并更新 git 里的输出 [renew the outputs kept in git]"""
    from .refresh import refresh_notebooks
    from .runner import print_summary

    results = refresh_notebooks(notebooks or [], output_dir=output_dir)
    print_summary(results, output_dir)
    raise typer.Exit(int(any(result.status != "ok" for result in results)))


@app.command()
def doctor(
    model: ModelName = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="给程序读的输出 [for programs]")] = False,
    explain: Annotated[
        str | None, typer.Option(metavar="FILE", help="解释一段报错，- 表示标准输入 [explain a traceback]")
    ] = None,
) -> None:
    """检查这台机器能不能运行 [preflight]，或解释一段报错；有问题、或不认识这段报错时退出码为 1"""
    if explain is not None:
        raise typer.Exit(_explain(explain, as_json))
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from .doctor import examine

    checks = examine(model)
    if as_json:
        _print_json([{"name": c.name, "found": c.found, "ok": c.ok, "advice": c.advice} for c in checks])
    else:
        table = Table("项目", "现状", "结论")
        for check in checks:
            table.add_row(check.name, escape(check.found), escape(check.advice or "OK"))
        Console().print(table)
    raise typer.Exit(int(not all(check.ok for check in checks)))


def _explain(file: str, as_json: bool) -> int:
    from dataclasses import asdict

    from .faults import explain

    text = sys.stdin.read() if file == "-" else _read_text(file)
    found = explain(text)
    if as_json:
        _print_json([asdict(error) for error in found])
    elif found:
        print("\n\n".join(map(str, found)))
    else:
        print("不认识这段报错 [unknown error]：请运行 python -m helpers doctor，看看环境哪里不对")
    return int(not found)


def _read_text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise HelpersError(f"读不了 {file} [cannot read]：{error.strerror}") from None


def _print_json(content) -> None:
    print(json.dumps(content, ensure_ascii=False, indent=2))


@app.command()
def download(
    local_dir: Annotated[str | None, typer.Option(help="放到哪里，默认数据盘或 ./models [target folder]")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="逐字节校验已有的文件，坏的重新下载 [check every byte]")
    ] = False,
) -> None:
    """从 ModelScope 下载 CharacterGLM-6B，约 12.5 GB [download the 6B model]"""
    from .download import download_model

    try:
        download_model(local_dir=local_dir, verify=verify)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None  # what a shell reports for Ctrl-C; the message is out already


@app.command()
def convert(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="放副本的新目录 [new folder for the copy]")],
    model: Annotated[str, typer.Option(help="6b、nano 或模型目录 [or a folder]")] = "6b",
) -> None:
    """把 .bin 权重另存一份 safetensors，可选 [optional safetensors copy]；load 不需要它，只读 safetensors 的工具需要"""
    from .convert import convert_checkpoint

    try:
        convert_checkpoint(model, directory)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def export(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="放导出结果的新目录 [new folder]")],
    model: Annotated[str, typer.Option(help="6b、nano 或模型目录 [or a folder]")] = "6b",
    adapter: Annotated[str | None, typer.Option(help="合并进权重的 LoRA adapter 的目录 [LoRA to merge]")] = None,
    dtype: Annotated[
        str, typer.Option(help="auto（和原文件相同）、float32、float16、bfloat16 [auto: as stored]")
    ] = "auto",
) -> None:
    """导出成标准的 GlmForCausalLM 目录，给 vLLM 等程序用 [plain folder for vLLM and others]"""
    from .export import export_model

    try:
        export_model(model, directory, adapter=adapter, dtype=dtype)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def receipt(first: Receipt, second: Receipt) -> None:
    """比较两份回执，说出哪里不同 [compare two receipts]；相同时退出码为 0，不同为 1，读不了为 2。秒数和内存只显示，不算不同"""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from .receipt import SECTIONS, ReceiptError, compare_receipts, is_measurement

    try:
        differences = compare_receipts(first, second)
    except ReceiptError as error:
        print(f"错误 [error]：{error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if differences:
        table = Table("部分", "名称", escape(first), escape(second))
        for section, *texts in differences:
            table.add_row(SECTIONS[section], *map(escape, texts))
        Console().print(table)
    count = sum(not is_measurement(section, name) for section, name, *_ in differences)
    print(f"{count} 处不同 [{count} differences]，另有 {len(differences) - count} 个测量值不同")
    raise typer.Exit(int(count > 0))


@app.command()
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
    from .serving import serve as serve_api

    add_page = None
    if page:
        from .demo.web import mount, require_password

        require_password(host, password, insecure)

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


@app.command()
def chat(
    model: ModelName = "auto",
    character: Annotated[str, typer.Option(help="和谁聊 [character]")] = "苏梦远",
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
    from .demo.terminal import start

    given = {
        "seed": seed,
        "temperature": temperature,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "max_new_tokens": max_new_tokens,
        "max_length": max_length,
        "do_sample": do_sample,
    }
    generation = {name: value for name, value in given.items() if value is not None}
    loading = {"adapter": adapter, "quantization": quantization, "compile": compile}
    start(model, character, file=load, once=once, loading=loading, **generation)


@app.command()
def demo(
    model: ModelName = "auto",
    adapter: Adapter = None,
    quantization: Quantization = None,
    compile: Compile = False,
    host: Annotated[str, typer.Option(help="绑定的地址 [address to bind]")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="端口；AutoDL 可以对外开放 6006 [port]")] = 6006,
    password: Annotated[
        str | None,
        typer.Option(metavar="USER:PASSWORD", envvar="CHARACTERGLM_DEMO_PASSWORD", help="进入页面要的密码 [login]"),
    ] = None,
    insecure: Annotated[bool, typer.Option(help="没有密码也绑定 127.0.0.1 以外的地址 [no login needed]")] = False,
    language: Annotated[str, typer.Option(help="页面的语言，zh 或 en [language]")] = "zh",
) -> None:
    """聊天网页 [web page]"""
    from .demo.web import serve

    loading = {"adapter": adapter, "quantization": quantization, "compile": compile}
    serve(model, loading, host=host, port=port, password=password, insecure=insecure, language=language)


@app.command(cls=PairCommand)
def finetune(
    model: ModelName = "auto",
    data: Annotated[str | None, typer.Option(help="JSON 或 JSONL 数据，默认鲁智深 [training data]")] = None,
    card: Annotated[str | None, typer.Option(help="角色名，或人设的 JSON 文件 [persona: name or file]")] = None,
    output_dir: Annotated[str, typer.Option(help="adapter 和 checkpoint 的目录 [where they go]")] = "outputs/lora",
    epochs: Annotated[float, typer.Option(min=0, help="训练几遍 [passes over the data]")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="每步几条，每个进程 [per device]")] = 4,
    learning_rate: Annotated[float | None, typer.Option(help="默认按模型大小选 [default: by size]")] = None,
    targets: Annotated[str, typer.Option(help="qkv、qv、all-linear [layers with an adapter]")] = "qkv",
    rank: Annotated[int, typer.Option(help="LoRA 的 r [rank]")] = 8,
    alpha: Annotated[int, typer.Option(help="LoRA 的 alpha")] = 32,
    dropout: Annotated[float, typer.Option(help="LoRA 的 dropout")] = 0.1,
    replay: Annotated[int, typer.Option(min=0, help="混入几段其他角色的对话 [against forgetting]")] = 0,
    max_length: Annotated[int, typer.Option(help="一条样本最多多少 token [tokens per sample]")] = 512,
    quantization: Annotated[str | None, typer.Option(help="nf4：4 bit QLoRA；int8 [quantised base]")] = None,
    on_bad_row: Annotated[str, typer.Option(help="skip 跳过坏行，raise 停下 [bad rows]")] = "skip",
    seed: Annotated[int, typer.Option(min=0, help="随机种子 [random seed]")] = 0,
    overwrite: Annotated[bool, typer.Option(help="删掉目录里已有的训练 [delete an earlier run]")] = False,
    merge_to: Annotated[str | None, typer.Option(help="另存合并后的完整模型 [save the merged model]")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME VALUE", help="TrainingArguments 的任何字段，可重复 [repeatable]"),
    ] = None,
) -> None:
    """LoRA 微调 [LoRA fine-tuning]；被中断后用同样的命令接着训练"""
    from .finetune.command import run_finetune
    from .runner import parse_parameters

    training = {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size,
        "seed": seed,
        **({} if learning_rate is None else {"learning_rate": learning_rate}),
        **parse_parameters(split_pairs(set_, "--set NAME VALUE")),
    }
    lora = {"targets": targets, "r": rank, "alpha": alpha, "dropout": dropout}
    options = {"replay": replay, "max_length": max_length, "quantization": quantization, "on_bad_row": on_bad_row}
    run_finetune(model, data, card, output_dir, lora, training, overwrite=overwrite, merge_to=merge_to, **options)


def main() -> None:
    """Run a command; a problem the reader can fix is one line and exit code 1."""
    try:
        app()
    except HelpersError as error:
        print(f"错误 [error]：{error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
