"""Does a batching server help many users without costing a single one?

Our server (`python -m helpers serve`) against the original lesson's (`support/lesson_server.py`, one request at a time)
and against plain `model.generate` in this process: the same model, prompts and parameters, sides alternating in one run,
medians over the rounds. On CharacterGLM-Nano and on a random model ten times its size, float32 on the CPU.

- one user: tokens a second of our server against plain `generate`, both greedy
- many at once: tokens a second against the lesson's server, and the 99th percentile of `GET /health` meanwhile
- one new user every 0.25 s: median time until the first words are there (the lesson's server does not stream)

Tokens are counted by encoding the replies again, in the same way for both sides.

    python benchmarks/serving.py
    python benchmarks/serving.py --model nano --rounds 5 --threads 1
    python benchmarks/serving.py --quick     # Nano, one round
"""

import asyncio
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import torch
import typer
from support.random_model import random_model
from support.report import JsonFile, Quick, publish

import helpers
from helpers.characters.dialogues import load_dialogues
from helpers.serving import Server
from helpers.serving.load_test import ask_all, health_delays

LESSON_SERVER = Path(__file__).parent / "support" / "lesson_server.py"
CHARACTER = "苏梦远"
GAP = 0.25
PORT = 16006  # or the next free one


def main(
    model: Annotated[str, typer.Option(help="nano, random, or both.")] = "both",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    users: Annotated[int, typer.Option(min=2, help="How many at once.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=8, help="Longest reply.")] = 64,
    threads: Annotated[int, typer.Option(help="torch threads; 0: torch's own choice.")] = 0,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    """Print a table of both servers and the ratios."""
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    model, rounds = ("nano", 1) if quick else (model, rounds)
    rows, ratios = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("nano", "random") if model == "both" else (model,):
            directory = helpers.resolve_model("nano") if name == "nano" else write_random_model(Path(folder) / "random")
            add_rows(name, asyncio.run(compare(directory, rounds, users, new_tokens)), users, rows, ratios)
    publish(
        "批处理的服务快多少，一个用户要付出代价吗？How much faster is the batching server, and does one user pay for it?",
        ["model", "question", "theirs", "ours"],
        rows,
        ratios=ratios,
        setting=f"medians of {rounds} rounds, CPU, float32, replies of at most {new_tokens} tokens",
        json_file=json_file,
    )


def write_random_model(directory: Path) -> Path:
    """A random model with Nano's tokenizer, as a directory both servers can load."""
    _, tokenizer = helpers.load("nano")
    random_model(len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


async def compare(directory: Path, rounds: int, users: int, new_tokens: int) -> dict[str, float]:
    """Medians over the rounds of everything measured."""
    bench = Bench(directory, new_tokens)
    measured: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as logs, ExitStack() as servers:
        ours, lesson = (
            servers.enter_context(Server(directory, script=script, port=port, log_file=Path(logs) / name)).url
            for name, script, port in (("ours", None, PORT), ("lesson", LESSON_SERVER, PORT + 1))
        )
        await bench.at_once(ours, users)  # warm-up
        await bench.at_once(lesson, 2)
        bench.plain(2)
        for _ in range(rounds):
            for figures in (
                {"plain 1": bench.plain(users // 2)},
                {"ours 1": await bench.one_by_one(ours, users // 2)},
                await bench.at_once(lesson, users, "lesson"),
                await bench.at_once(ours, users, "ours"),
                {"lesson first": await bench.arriving(lesson, users, stream=False)},
                {"ours first": await bench.arriving(ours, users, stream=True)},
            ):
                for name, value in figures.items():
                    measured.setdefault(name, []).append(value)
    return {name: statistics.median(values) for name, values in measured.items()}


class Bench:
    """The requests, the same for every side."""

    def __init__(self, directory: Path, new_tokens: int):
        self.model, self.tokenizer = helpers.load(directory)
        self.card = helpers.get_character(CHARACTER)
        self.new_tokens = new_tokens
        held_out = [d for d in load_dialogues() if d.held_out and d.card.bot_name == CHARACTER]
        self.prompts = [query for dialogue in held_out for query, _ in dialogue.history if query]
        longest = max(len(self.encode(prompt)["input_ids"][0]) for prompt in self.prompts)
        self.max_length = longest + new_tokens

    def encode(self, prompt: str) -> dict:
        """The prompt as `generate` takes it."""
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            session_meta=self.card,
            add_generation_prompt=True,
            return_tensors="pt",
        )

    def rate(self, texts: list[str], seconds: float) -> float:
        """Tokens a second; each reply has one more, its end."""
        return sum(len(self.tokenizer.encode(text, add_special_tokens=False)) + 1 for text in texts) / seconds

    def plain(self, count: int) -> float:
        """Tokens a second of `model.generate`, one after another, greedy."""
        options = {"do_sample": False, "repetition_penalty": 1.05, "eos_token_id": [2, 13], "pad_token_id": 0}
        options |= {"temperature": None, "top_p": None, "top_k": None}
        start, texts = time.perf_counter(), []
        for prompt in self.prompts[:count]:
            inputs = self.encode(prompt)
            output = self.model.generate(**inputs, max_new_tokens=self.new_tokens, **options)
            texts.append(self.tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        return self.rate([text.strip() for text in texts], time.perf_counter() - start)

    async def one_by_one(self, url: str, count: int) -> float:
        """Tokens a second of a server with one user, greedy and streamed."""
        texts, seconds = [], 0.0
        for prompt in self.prompts[:count]:
            answers, took = await ask_all(
                url, [prompt], stream=True, temperature=0, repetition_penalty=1.05, max_tokens=self.new_tokens
            )
            texts.append(answers[0].text)
            seconds += took
        return self.rate(texts, seconds)

    async def at_once(self, url: str, users: int, name: str = "") -> dict[str, float]:
        """Tokens a second with that many users, and the 99th percentile of /health meanwhile."""
        work = asyncio.create_task(ask_all(url, self.prompts[:users], max_length=self.max_length))
        delays = await health_delays(url, until=work)
        answers, seconds = await work
        return {
            f"{name} {users}": self.rate([answer.text for answer in answers], seconds),
            f"{name} health": percentile_99(delays),
        }

    async def arriving(self, url: str, users: int, stream: bool) -> float:
        """Median seconds until a user sees the first words, one new user every 0.25 s."""
        options = {"temperature": 0.95, "top_p": 0.7}
        options |= {"stream": True, "max_tokens": self.new_tokens} if stream else {"max_length": self.max_length}
        answers, _ = await ask_all(url, self.prompts[:users], gap=GAP, **options)
        return statistics.median(answer.first for answer in answers)


def percentile_99(values: list[float]) -> float:
    """The value that 99 of 100 do not exceed."""
    return statistics.quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]


def add_rows(model: str, figures: dict[str, float], users: int, rows: list, ratios: dict) -> None:
    """One row and one ratio a question."""

    def add(question: str, theirs: str, ours: str, unit: str, more_is_better: bool = True) -> None:
        a, b = figures[theirs], figures[ours]
        rows.append([model, question, f"{a:,.3g} {unit}", f"{b:,.3g} {unit}"])
        ratios[f"{model}: {question}"] = b / a if more_is_better else a / b

    add("1 user, against plain generate", "plain 1", "ours 1", "tokens/s")
    add(f"{users} users at once, against the lesson", f"lesson {users}", f"ours {users}", "tokens/s")
    add(f"/health, 99th percentile, {users} users", "lesson health", "ours health", "s", more_is_better=False)
    add(f"first words, one user every {GAP} s", "lesson first", "ours first", "s", more_is_better=False)


if __name__ == "__main__":
    typer.run(main)
