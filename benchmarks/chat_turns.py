"""How long is each turn of a chat of 50 turns, with the KV cache kept and without?

Measured: seconds from the query to the end of the reply, turn by turn, greedy. One `ChatSession` keeps its cache, the
other is told to free it before each turn and so computes its whole prompt; the same queries in both, the sides taking
turns in going first. Every reply must be the same on both sides. The whole chat three times. Printed: the median of the
first and of the last ten turns, the whole chat, and their ratios; on CharacterGLM-Nano, whose replies end by themselves,
and on a random model ten times its size, whose replies have 12 tokens.

    python benchmarks/chat_turns.py
    python benchmarks/chat_turns.py --turns 30 --threads 1
    python benchmarks/chat_turns.py --quick     # Nano, 30 turns
"""

import statistics
import time
from typing import Annotated

import typer
from support.random_model import random_model
from support.report import JsonFile, Quick, Threads, publish
from support.rounds import ROUNDS, Ratio, in_turns
from support.talk import CHARACTER, queries

import helpers

TEN = 10  # turns at either end
GREEDY = {"do_sample": False, "max_new_tokens": 32}
RANDOM_REPLY = {"do_sample": False, "min_new_tokens": 12, "max_new_tokens": 12}


def main(
    turns: Annotated[int, typer.Option(min=2 * TEN)] = 50,
    threads: Threads = 0,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    """Print the seconds of a turn and of the chat, in both ways."""
    turns = 30 if quick else turns
    nano, tokenizer = helpers.load("nano", device_map="cpu", dtype="float32")
    models = {"Nano": (nano, GREEDY)}
    if not quick:
        models["random"] = random_model(len(tokenizer)), RANDOM_REPLY
    rows, ratios, lines = [], {}, {}
    for name, (model, options) in models.items():
        chats = [chat(model, tokenizer, turns, options) for _ in range(ROUNDS)]
        seconds = {way: [chat[way] for chat, _ in chats] for way in ("kept", "anew")}
        add_rows(name, seconds, chats[0][1], rows, ratios)
        lines |= {f"{name}, {way}": list(map(statistics.median, zip(*turns))) for way, turns in seconds.items()}
    publish(
        f"聊 {turns} 轮，保留 KV cache 每轮快多少？How much faster is a turn with the KV cache kept, over {turns} turns?",
        ["model", "what", "prompt tokens", "cache kept", "computed anew"],
        rows,
        ratios=ratios,
        setting=f"CPU, float32, greedy, the same replies on both sides, {ROUNDS} chats",
        json_file=json_file,
        chart={"x": "turn", "y": "seconds from query to end of reply", "lines": lines},
    )


def chat(model, tokenizer, turns: int, options: dict) -> tuple[dict[str, list[float]], list[int]]:
    """Seconds of every turn in both ways, and the tokens of its prompt."""
    card = helpers.get_character(CHARACTER)
    sessions = {way: helpers.ChatSession(model, tokenizer, card, **options) for way in ("kept", "anew")}
    sessions["kept"].send("你好")  # warm-up
    sessions["kept"].undo()
    sessions["kept"].free_cache()
    tokens = []

    def kept(query: str) -> float:
        seconds = take_turn(sessions["kept"], query)
        assert not sessions["kept"].dropped_turns, "the chat is longer than the model's context: fewer --turns"
        tokens.append(sessions["kept"].statistics["prompt_tokens"])
        return seconds

    seconds = in_turns(
        {"kept": kept, "anew": lambda query: take_turn(sessions["anew"], query, anew=True)}, queries(CHARACTER)[:turns]
    )
    assert sessions["kept"].history == sessions["anew"].history, "the replies differ"
    return seconds, tokens


def take_turn(session, query: str, anew: bool = False) -> float:
    """Seconds for one exchange."""
    if anew:
        session.free_cache()
    start = time.perf_counter()
    session.send(query)
    return time.perf_counter() - start


def add_rows(name: str, seconds: dict[str, list[list[float]]], tokens: list[int], rows: list, ratios: dict) -> None:
    """The first and the last ten turns and the whole chat of a model, from the seconds of every turn of every chat."""
    cases = {
        f"median of the first {TEN} turns": (slice(TEN), statistics.median, tokens[TEN - 1]),
        f"median of the last {TEN} turns": (slice(-TEN, None), statistics.median, tokens[-1]),
        f"all {len(tokens)} turns": (slice(None), sum, tokens[-1]),
    }
    for case, (part, together, prompt) in cases.items():
        kept, anew = ([together(turns[part]) for turns in seconds[way]] for way in ("kept", "anew"))
        medians = (f"{statistics.median(chats):.3f} s" for chats in (kept, anew))
        rows.append([name, case, f"up to {prompt:,}", *medians])
        ratios[f"{name}: {case}, cache kept against anew"] = Ratio.of(anew, kept)


if __name__ == "__main__":
    typer.run(main)
