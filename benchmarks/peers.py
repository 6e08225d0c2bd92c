"""What else could serve the same model, and how fast?

Ours (`python -m helpers serve`), transformers' own server (`transformers serve --continuous-batching`) and llama.cpp's
(`xllamacpp`), side by side in one run on the same exported weights: ours and transformers' in float32, llama.cpp's in BF16
and, smaller, in Q8_0. The same requests to `/v1/chat/completions`, greedy, streamed; the same number of threads each; sides
alternating. On CharacterGLM-Nano and on random models of 50 and, if asked for, 340 million weights. Tokens are counted by
encoding the replies again.

- one user: tokens a second
- many at once: tokens a second together
- one new user every 0.25 s: median time until the first words are there

    python benchmarks/peers.py
    python benchmarks/peers.py --quick     # Nano, 8 users, shorter replies
    python benchmarks/peers.py --model 340M --users 4 --new-tokens 16
"""

import asyncio
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import httpx
import typer
from support.llama_server import LlamaServer
from support.random_model import SHAPES, save_random_model
from support.report import JsonFile, Quick, publish, set_threads
from support.rounds import ROUNDS, Ratio, in_turns
from support.talk import CHARACTER, queries, token_rate
from transformers import AutoTokenizer

import helpers
from helpers.export.plain import export_model
from helpers.network import free_port
from helpers.serving import Server
from helpers.serving.load_test import ask_all
from helpers.serving.server import default_threads

OURS, TRANSFORMERS, LLAMA = "helpers", "transformers serve", "llama.cpp"
PORT = 18006  # or the next free one
GAP = 0.25
CONTEXT = 2048  # of each user
# On repetition; transformers' batching knows none.
NO_PENALTY = {OURS: {"repetition_penalty": 1.0}, TRANSFORMERS: {}, LLAMA: {"repeat_penalty": 1.0}}
Size = Enum("Size", {name: name for name in ("nano", *SHAPES)})
QUESTIONS = {
    "one": "1 user, tokens/s",
    "many": "{} users at once, tokens/s",
    "first": "first words, one user every 0.25 s",
}
# Its own choice of blocks takes more than half of the memory and 18 s to start.
BATCHING = ["--continuous-batching", "--cb-num-blocks", "256", "--cb-block-size", "64", "--cb-max-batch-tokens", "512"]


def main(
    model: Annotated[list[Size] | None, typer.Option(help="By default nano and 50M.")] = None,
    rounds: Annotated[int, typer.Option(min=ROUNDS)] = ROUNDS,
    users: Annotated[int, typer.Option(min=2, help="How many at once.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=8, help="Longest reply.")] = 32,
    threads: Annotated[int, typer.Option(help="On all sides; 0: as many as the server takes.")] = 0,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    """Print what each server gives and the ratios of ours to the others."""
    threads = set_threads(threads or default_threads())
    users, new_tokens = (8, 16) if quick else (users, new_tokens)
    rows, ratios = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ["nano"] if quick else [size.value for size in model or (Size["nano"], Size["50M"])]:
            if name == "nano":
                directory = helpers.resolve_model(name)
            else:
                directory = save_random_model(Path(folder) / name, **SHAPES[name])
            figures = compare(directory, Path(folder) / f"{name} exported", rounds, users, new_tokens, threads)
            add_rows(name, figures, users, rows, ratios)
    if importlib.util.find_spec("xllamacpp") is None:
        rows.append(["", f"{LLAMA}: not installed, see requirements-dev.txt", "", ""])
    publish(
        "别的程序来服务同一个模型，有多快？What else could serve the same model, and how fast?",
        ["model", "question", "server", "figure"],
        rows,
        ratios=ratios,
        setting=f"medians of {rounds} rounds, CPU, {threads} thread(s) a side, replies of at most {new_tokens} tokens",
        json_file=json_file,
    )


def compare(directory: Path, exported: Path, rounds: int, users: int, new_tokens: int, threads: int) -> dict:
    """For each server, what `ask_for_everything` found, round by round."""
    export_model(directory, exported)
    ask = partial(ask_for_everything, AutoTokenizer.from_pretrained(directory), users, new_tokens)
    with tempfile.TemporaryDirectory() as logs, ExitStack() as running:
        options = ["--threads", threads]
        ours = Server(directory, port=PORT, log_file=Path(logs) / "ours", options=options)
        urls = {OURS: running.enter_context(ours).url}
        urls[TRANSFORMERS] = running.enter_context(transformers_serve(exported, threads, Path(logs) / "theirs"))
        servers = llama_servers(directory, Path(logs), users, threads)  # named: they live as long as this name
        urls |= {kind: server.server.listening_address for kind, server in servers.items()}
        sides: dict[str, Callable] = {
            side: partial(ask, url, str(exported) if side == TRANSFORMERS else "characterglm", no_penalty(side))
            for side, url in urls.items()
        }
        return in_turns(sides, range(rounds + 1), warm_up=True)


def no_penalty(side: str) -> dict:
    """As that server calls it."""
    return next(fields for name, fields in NO_PENALTY.items() if side.startswith(name))


def llama_servers(directory: Path, folder: Path, users: int, threads: int) -> dict[str, LlamaServer]:
    """llama.cpp's, one for each kind of file; none if it is not installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        return {}
    from helpers.export.gguf import export_gguf  # gguf is imported only where it is used

    files = {kind: export_gguf(directory, folder / f"{kind}.gguf", kind=kind) for kind in ("bf16", "q8_0")}
    return {
        f"{LLAMA} {kind.upper()}": LlamaServer(file, CONTEXT * users, parallel=users, threads=threads)
        for kind, file in files.items()
    }


@contextmanager
def transformers_serve(exported: Path, threads: int, log_file: Path) -> Iterator[str]:
    """The address of transformers' own server, in a process of its own."""
    port = free_port(PORT + 1)
    start = "from transformers.cli.transformers import main; main()"
    options = ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port), *BATCHING]
    command = [sys.executable, "-c", start, "serve", str(exported), *options]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with log_file.open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log_file)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def wait_for(url: str, process: subprocess.Popen, log_file: Path, seconds: float = 120) -> None:
    """Until the server answers; RuntimeError with its log if it does not."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, trust_env=False).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.3)
    raise RuntimeError(f"no answer from {url}:\n{log_file.read_text(errors='replace')[-2000:]}")


def ask_for_everything(
    tokenizer, users: int, new_tokens: int, url: str, model: str, extra: dict, _: int
) -> dict[str, float]:
    """The figures of a server in a round."""
    prompts = queries(CHARACTER)[:users]
    options = {"stream": True, "model": model, "max_tokens": new_tokens, "temperature": 0, **extra}

    def rate(answers: list, seconds: float) -> float:
        return token_rate(tokenizer, [answer.text for answer in answers], seconds)

    alone = [asyncio.run(ask_all(url, [prompt], **options)) for prompt in prompts[: users // 2]]
    together = asyncio.run(ask_all(url, prompts, **options))
    arriving, _ = asyncio.run(ask_all(url, prompts, gap=GAP, **options))
    return {
        "one": rate([answers[0] for answers, _ in alone], sum(seconds for _, seconds in alone)),
        "many": rate(*together),
        "first": statistics.median(answer.first for answer in arriving),
    }


def add_rows(model: str, figures: dict[str, list[dict]], users: int, rows: list, ratios: dict) -> None:
    """A row for each question and server, and how much better ours is."""
    for name, question in QUESTIONS.items():
        sides = {side: [found[name] for found in each] for side, each in figures.items()}
        for side, each in sides.items():
            rows.append([model, question.format(users), side, f"{statistics.median(each):,.3g}"])
            if side != OURS:
                ours, theirs = sides[OURS], each
                ratio = Ratio.of(theirs, ours) if name == "first" else Ratio.of(ours, theirs)
                ratios[f"{model}: {question.format(users)}, against {side}"] = ratio


if __name__ == "__main__":
    typer.run(main)
