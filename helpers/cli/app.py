"""`python -m helpers COMMAND`: every command by its name. A command imports what it needs only when it runs."""

import io
import sys

import typer

from ..errors import HelpersError
from . import copies, finetune, machine, notebooks, serve, talk
from .options import PairCommand

app = typer.Typer(
    help="CharacterGLM-6B：运行 notebook、聊天、服务、微调、下载与体检、转换与导出 "
    "[run, chat, serve, finetune, download, doctor, convert, export]",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # would swallow the words in brackets
    pretty_exceptions_enable=False,
)
for command in (
    *(notebooks.run, notebooks.refresh, machine.doctor, machine.download, copies.convert, copies.export),
    *(notebooks.receipt, serve.serve, talk.chat, talk.demo, finetune.finetune),
):
    app.command(cls=PairCommand)(command)


def main() -> None:
    """Run a command; a problem the reader can fix is one line and exit code 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # "?" for what a terminal without UTF-8 cannot show
    try:
        app()
    except HelpersError as error:
        print(f"错误 [error]：{error}", file=sys.stderr)
        sys.exit(1)
