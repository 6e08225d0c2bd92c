"""Options that several commands share, and options that take a name and a value, as papermill does."""

from typing import Annotated

import typer
from typer.core import TyperCommand

ModelName = Annotated[str, typer.Option(help="auto、nano、6b 或模型目录 [or a folder]")]
Adapter = Annotated[str | None, typer.Option(help="LoRA adapter 的目录 [folder of a LoRA adapter]")]
Quantization = Annotated[str | None, typer.Option(help="int8 或 nf4：权重省一半或更多 [smaller weights]")]
Compile = Annotated[bool, typer.Option("--compile", help="编译，第一条回复慢，之后更快 [torch.compile]")]


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
