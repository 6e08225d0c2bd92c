"""Does a batching server help many users without costing a single one?

Our server (`python -m helpers serve`) against the original lesson's (`support/lesson_server.py`, one request at a time)
and against plain `model.generate` in this process: the same model, prompts, parameters and threads, sides alternating in
one run. On CharacterGLM-Nano and on a random model ten times its size, float32 on the CPU.

- one user: tokens a second of our server against plain `generate`, both greedy and streamed
- many at once: tokens a second against the lesson's server, and the 99th percentile of `GET /health` meanwhile
- one new user every 0.25 s: median time until the first words are there (the lesson's server does not stream: its first words
  are there when all of them are)

Tokens are counted by encoding the replies again, in the same way for both sides.

    python benchmarks/serving.py
    python benchmarks/serving.py --model nano --rounds 5 --threads 1
    python benchmarks/serving.py --quick     # Nano, shorter replies
"""

import asyncio
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from support.random_model import save_random_model
from support.report import JsonFile, Quick, publish, set_threads
from support.rounds import ROUNDS, Ratio, in_turns
from support.talk import CHARACTER, token_rate
from transformers import TextIteratorStreamer

import helpers
from helpers.characters.dialogues import load_dialogues
from helpers.serving import Server
from helpers.serving.load_test import ask_all, health_delays
from helpers.serving.server import default_threads

LESSON_SERVER = Path(__file__).parent / "support" / "lesson_server.py"
GAP = 0.25
PORT = 16006  # or the next free one


def main(
    model: Annotated[str, typer.Option(help="nano, random, or both.")] = "both",
    rounds: Annotated[int, typer.Option(min=ROUNDS)] = ROUNDS,
    users: Annotated[int, typer.Option(min=2, help="How many at once.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=8, help="Longest reply.")] = 64,
    threads: Annotated[int, typer.Option(help="On all sides; 0: as many as the server takes.")] = 0,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    """Print a table of both servers and the ratios."""
    threads = set_threads(threads or default_threads())
    model, new_tokens = ("nano", 32) if quick else (model, new_tokens)
    rows, ratios = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("nano", "random") if model == "both" else (model,):
            directory = helpers.resolve_model("nano") if name == "nano" else save_random_model(Path(folder) / "random")
            add_rows(name, compare(directory, rounds, users, new_tokens, threads), users, rows, ratios)
    publish(
        "批处理的服务快多少，一个用户要付出代价吗？How much faster is the batching server, and does one user pay for it?",
        ["model", "question", "theirs", "ours"],
        rows,
        ratios=ratios,
        setting=f"medians of {rounds} rounds, CPU, float32, replies of at most {new_tokens} tokens, {threads} thread(s) a side",
        json_file=json_file,
    )


def compare(directory: Path, rounds: int, users: int, new_tokens: int, threads: int) -> dict[str, list[float]]:
    """Everything measured, round by round."""
    bench = Bench(directory, new_tokens)
    with tempfile.TemporaryDirectory() as logs, ExitStack() as servers:
        ours, lesson = (
            servers.enter_context(
                Server(directory, script=script, port=port, log_file=Path(logs) / name, options=options)
            ).url
            for name, script, port, options in (
                ("ours", None, PORT, ["--threads", threads]),
                ("lesson", LESSON_SERVER, PORT + 1, [threads]),
            )
        )
        figures = in_turns(
            {
                "plain": lambda _: {"1": bench.plain(users // 2)},
                "ours": lambda _: asyncio.run(bench.all_of(ours, users, stream=True)),
                "lesson": lambda _: asyncio.run(bench.all_of(lesson, users, stream=False)),
            },
            range(rounds + 1),
            warm_up=True,
        )
    return {f"{side} {name}": [each[name] for each in found] for side, found in figures.items() for name in found[0]}


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

    def plain(self, count: int) -> float:
        """Tokens a second of `model.generate`, one after another, greedy, as pieces of text."""
        options = {"do_sample": False, "repetition_penalty": 1.05, "eos_token_id": [2, 13], "pad_token_id": 0}
        options |= {"temperature": None, "top_p": None, "top_k": None}
        start, texts = time.perf_counter(), []
        for prompt in self.prompts[:count]:
            streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.model.generate(**self.encode(prompt), streamer=streamer, max_new_tokens=self.new_tokens, **options)
            texts.append("".join(streamer))
        return token_rate(self.tokenizer, [text.strip() for text in texts], time.perf_counter() - start)

    async def all_of(self, url: str, users: int, stream: bool) -> dict[str, float]:
        """What a server is asked in a round; one user only if it streams."""
        alone = {"1": await self.one_by_one(url, users // 2)} if stream else {}
        return alone | await self.at_once(url, users) | {"first": await self.arriving(url, users, stream)}

    async def one_by_one(self, url: str, count: int) -> float:
        """Tokens a second of a server with one user, greedy and streamed."""
        texts, seconds = [], 0.0
        for prompt in self.prompts[:count]:
            answers, took = await ask_all(
                url, [prompt], stream=True, temperature=0, repetition_penalty=1.05, max_tokens=self.new_tokens
            )
            texts.append(answers[0].text)
            seconds += took
        return token_rate(self.tokenizer, texts, seconds)

    async def at_once(self, url: str, users: int) -> dict[str, float]:
        """Tokens a second with that many users, and the 99th percentile of /health meanwhile."""
        work = asyncio.create_task(ask_all(url, self.prompts[:users], max_length=self.max_length))
        delays = await health_delays(url, until=work)
        answers, seconds = await work
        return {
            str(users): token_rate(self.tokenizer, [answer.text for answer in answers], seconds),
            "health": percentile_99(delays),
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


def add_rows(model: str, figures: dict[str, list[float]], users: int, rows: list, ratios: dict) -> None:
    """One row and one ratio a question."""

    def add(question: str, theirs: str, ours: str, unit: str, more_is_better: bool = True) -> None:
        a, b = figures[theirs], figures[ours]
        rows.append([model, question, *(f"{statistics.median(side):,.3g} {unit}" for side in (a, b))])
        ratios[f"{model}: {question}"] = Ratio.of(b, a) if more_is_better else Ratio.of(a, b)

    add("1 user, against plain generate", "plain 1", "ours 1", "tokens/s")
    add(f"{users} users at once, against the lesson", f"lesson {users}", f"ours {users}", "tokens/s")
    add(f"/health, 99th percentile, {users} users", "lesson health", "ours health", "s", more_is_better=False)
    add(f"first words, one user every {GAP} s", "lesson first", "ours first", "s", more_is_better=False)


if __name__ == "__main__":
    typer.run(main)
