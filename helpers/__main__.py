"""The command line: `python -m helpers COMMAND`. Each command imports what it needs only when it runs."""

import sys
from typing import Annotated

import typer
from typer.core import TyperCommand

from .errors import HelpersError

app = typer.Typer(
    help="CharacterGLM-6B：运行 notebook、聊天、下载与体检 [run, chat, download, doctor]",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # would swallow the words in brackets
    pretty_exceptions_enable=False,
)

Numbers = Annotated[list[str] | None, typer.Argument(metavar="[01 02 ...]", help="notebook 编号，默认全部 [all]")]
ModelName = Annotated[str, typer.Option(help="auto、nano、6b 或模型目录 [or a folder]")]
Adapter = Annotated[str | None, typer.Option(help="LoRA adapter 的目录 [folder of a LoRA adapter]")]
OutputDir = Annotated[str, typer.Option(help="已执行的 notebook、回执和 run.json 的目录 [where outputs go]")]


class PairCommand(TyperCommand):
    """Takes papermill's `-p NAME VALUE`, joined into one word before parsing: Typer has no list of pairs."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Parse after turning every `-p NAME VALUE` into `-p NAME=VALUE`."""
        return super().parse_args(ctx, join_pairs(args))


def join_pairs(args: list[str]) -> list[str]:
    """`args` with the two words after -p or --parameter made one; `-p NAME=VALUE` is left as it is."""
    joined: list[str] = []
    words = iter(args)
    for word in words:
        joined.append(word)
        if word in ("-p", "--parameter"):
            name = next(words, None)
            value = next(words, None) if name and "=" not in name else None
            joined += [] if name is None else [name if value is None else f"{name}={value}"]
    return joined


def split_pairs(pairs: list[str] | None) -> list[tuple[str, str]]:
    """(name, value) of every NAME=VALUE; bad usage if the value is missing."""
    split = [pair.partition("=") for pair in pairs or []]
    for name, equals, _ in split:
        if not name or not equals:
            raise typer.BadParameter("写法是 -p NAME VALUE [-p takes a name and a value]", param_hint="-p")
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
def doctor(model: ModelName = "auto") -> None:
    """检查这台机器能不能运行 [preflight]；有问题时退出码为 1"""
    from rich.console import Console
    from rich.table import Table

    from .doctor import preflight

    checks = preflight(model)
    table = Table("项目", "现状", "结论")
    for check in checks:
        table.add_row(check.name, check.found, check.advice or "OK")
    Console().print(table)
    raise typer.Exit(int(not all(check.ok for check in checks)))


@app.command()
def download(
    local_dir: Annotated[str | None, typer.Option(help="放到哪里，默认数据盘或 ./models [target folder]")] = None,
) -> None:
    """从 ModelScope 下载 CharacterGLM-6B，约 12.5 GB [download the 6B model]"""
    from .download import download_model

    print(download_model(local_dir=local_dir))


@app.command()
def chat(
    model: ModelName = "auto",
    character: Annotated[str, typer.Option(help="和谁聊 [character]")] = "苏梦远",
    adapter: Adapter = None,
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
    start(model, character, adapter=adapter, file=load, once=once, **generation)


@app.command()
def demo(
    model: ModelName = "auto",
    adapter: Adapter = None,
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

    serve(model, adapter=adapter, host=host, port=port, password=password, insecure=insecure, language=language)


def main() -> None:
    """Run a command; a problem the reader can fix is one line and exit code 1."""
    try:
        app()
    except HelpersError as error:
        print(f"错误 [error]：{error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
