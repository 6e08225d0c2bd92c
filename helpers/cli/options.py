"""Options that several commands share."""

from contextlib import suppress
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

ModelName = Annotated[str, typer.Option(help="auto、nano、6b 或模型目录 [or a folder]")]
Adapter = Annotated[str | None, typer.Option(help="LoRA adapter 的目录 [folder of a LoRA adapter]")]
Quantization = Annotated[str | None, typer.Option(help="int8 或 nf4：权重省一半或更多 [smaller weights]")]
Compile = Annotated[bool, typer.Option("--compile", help="编译，第一条回复慢，之后更快 [torch.compile]")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="端口；AutoDL 可以对外开放 6006 [port]")]
Host = Annotated[str, typer.Option(help="绑定的地址 [address to bind]")]
Password = Annotated[
    str | None,
    typer.Option(metavar="USER:PASSWORD", envvar="CHARACTERGLM_DEMO_PASSWORD", help="进入网页要的密码 [login]"),
]
Proxy = Annotated[
    str | None,
    typer.Option(metavar="URL", help="前面有代理时，浏览器里的地址，见 docs/proxy.md [public address]"),
]
PAIR = {"metavar": "NAME VALUE", "parser": lambda words: words}  # Typer has no annotation for a list of pairs
Pairs = list[Any] | None  # of (name, value), see PairCommand


class PairCommand(TyperCommand):
    """A command whose options with the metavar `NAME VALUE` take two words each, as papermill's -p does."""

    def __init__(self, *args, params, **more) -> None:
        super().__init__(*args, params=params, **more)
        for param in params:
            if param.metavar == PAIR["metavar"]:
                param.nargs = 2


def refuse_together(context: typer.Context, option: str, *others: str) -> None:
    """Raise `typer.BadParameter` if `option` stands on the command line beside one of those that it decides."""
    given = [name for name in (option, *others) if context.get_parameter_source(name).name == "COMMANDLINE"]
    if option in given and len(given) > 1:
        what = "、".join(f"--{name}" for name in given[1:])
        raise typer.BadParameter(f"{what} 由它决定 [{option} decides]，请去掉", param_hint=f"--{option}")


def typed(pairs: Pairs) -> dict[str, Any]:
    """{name: value}, the values typed as on papermill's command line: "True", "None", "3", "0.5" are what they look like."""
    return {name: _typed(text) for name, text in pairs or []}


def _typed(text: str) -> Any:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return {"True": True, "False": False, "None": None}.get(text, text)
