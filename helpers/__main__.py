"""The command line: `python -m helpers COMMAND`. Each command imports what it needs only when it runs."""

import sys
from typing import Annotated

import typer
from typer.core import TyperCommand

from .errors import HelpersError

app = typer.Typer(
    help="CharacterGLM-6B：运行 notebook、微调、下载与体检 [run, finetune, download, doctor]",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # would swallow the words in brackets
    pretty_exceptions_enable=False,
)

Numbers = Annotated[list[str] | None, typer.Argument(metavar="[01 02 ...]", help="notebook 编号，默认全部 [all]")]
OutputDir = Annotated[str, typer.Option(help="已执行的 notebook、回执和 run.json 的目录 [where outputs go]")]


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


def split_pairs(pairs: list[str] | None, option: str = "-p") -> list[tuple[str, str]]:
    """(name, value) of every NAME=VALUE; bad usage if the value is missing."""
    split = [pair.partition("=") for pair in pairs or []]
    for name, equals, _ in split:
        if not name or not equals:
            raise typer.BadParameter(
                f"写法是 {option} NAME VALUE [{option} takes a name and a value]", param_hint=option
            )
    return [(name, value) for name, _, value in split]


@app.command(cls=PairCommand)
def run(
    notebooks: Numbers = None,
    model: Annotated[str, typer.Option(help="auto、nano、6b 或模型目录 [or a folder]")] = "auto",
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
def doctor(model: Annotated[str, typer.Option(help="auto、nano、6b 或模型目录 [or a folder]")] = "auto") -> None:
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


@app.command(cls=PairCommand)
def finetune(
    model: Annotated[str, typer.Option(help="auto、nano、6b 或模型目录 [or a folder]")] = "auto",
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
        **parse_parameters(split_pairs(set_, "--set")),
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
