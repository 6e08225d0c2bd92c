"""Do two replicas answer more users than one, and what does Ray cost?

Three servers of `python -m helpers serve` run side by side: the single server, `--replicas 1` on Ray (any
option of the replicas makes it so), and `--replicas 2`. Each may use all cores: the first two with as many threads as there are,
the replicas of the third with half as many each. Every round all users ask at once and stream their replies, one server
after the other, in alternating order; a seed makes the replies the same on each. Printed: medians of tokens a second.

On a CPU two replicas share the cores that one has, so little can be gained here; and on a busy machine more processes get
more of it, so the machine has to be quiet. What a second GPU gains is for a machine with two.

    python benchmarks/cluster.py
    python benchmarks/cluster.py --quick     # Nano, shorter replies
"""

import asyncio
import os
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from support.random_model import save_random_model
from support.report import JsonFile, Quick, publish
from support.rounds import ROUNDS, Ratio, in_turns
from support.talk import queries, token_rate
from transformers import AutoTokenizer

import helpers
from helpers.network import free_port
from helpers.serving import Server
from helpers.serving.load_test import ask_all

PORT = 17006  # or the next free one
SAMPLING = {"temperature": 0.95, "top_p": 0.7, "seed": 1}


def main(
    model: Annotated[str, typer.Option(help="nano, random (ten times its size), or both.")] = "both",
    rounds: Annotated[int, typer.Option(min=ROUNDS)] = 5,
    users: Annotated[int, typer.Option(min=2, help="How many at once.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=8, help="Longest reply.")] = 64,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    """Print tokens a second of each server, and the ratios."""
    model, rounds, new_tokens = ("nano", ROUNDS, 32) if quick else (model, rounds, new_tokens)
    rows, ratios = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("nano", "random") if model == "both" else (model,):
            directory = helpers.resolve_model("nano") if name == "nano" else save_random_model(Path(folder) / "random")
            rates = compare(directory, rounds, users, new_tokens)
            rows += [[name, side, f"{statistics.median(each):,.0f} tokens/s"] for side, each in rates.items()]
            plain, one, two = rates.values()
            ratios |= {
                f"{name}: two replicas, against one": Ratio.of(two, one),
                f"{name}: two replicas, against the single server": Ratio.of(two, plain),
                f"{name}: one replica on Ray, against the single server": Ratio.of(one, plain),
            }
    publish(
        "两个副本比一个多答多少用户？How much more do two replicas answer than one?",
        ["model", "server", "together"],
        rows,
        ratios=ratios,
        setting=f"medians of {rounds} rounds, {users} users at once, CPU, float32, {os.cpu_count()} cores",
        json_file=json_file,
    )


def compare(directory: Path, rounds: int, users: int, new_tokens: int) -> dict[str, list[float]]:
    """Tokens a second of the single server, one replica and two, round by round."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    cores = os.cpu_count() or 1
    sides = {
        "single server": ["--threads", cores],
        "1 replica": ["--max-replicas", 1, "--gpus-per-replica", 0, "--threads", cores],
        "2 replicas": ["--replicas", 2, "--gpus-per-replica", 0, "--threads", max(1, cores // 2)],
    }
    ask = {}
    with tempfile.TemporaryDirectory() as logs, ExitStack() as servers:
        for number, (side, options) in enumerate(sides.items()):
            log, port = Path(logs) / str(number), free_port(PORT)
            url = servers.enter_context(Server(directory, port=port, log_file=log, options=options)).url
            ask[side] = lambda asked, url=url: asyncio.run(rate(url, tokenizer, asked, new_tokens))
        return in_turns(ask, [queries()[:users]] * (rounds + 1), warm_up=True)


async def rate(url: str, tokenizer, prompts: list[str], new_tokens: int) -> float:
    """Tokens a second with a user for each prompt."""
    answers, seconds = await ask_all(url, prompts, stream=True, max_tokens=new_tokens, **SAMPLING)
    return token_rate(tokenizer, [answer.text for answer in answers], seconds)


if __name__ == "__main__":
    typer.run(main)
