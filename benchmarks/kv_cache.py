"""How much sooner does a reply begin if the KV cache is kept from turn to turn?

Measured: the time to the first token, thread start included, in a conversation whose prompt has about 1,500 tokens.
A `ChatSession` that has kept its cache against a new one, which computes the whole prompt, for the same history and
query: both in one run, in alternating order, after a warm-up, the conversation going on by one turn a repetition.
Printed: medians and their ratio, on CharacterGLM-Nano and on a random model of the same architecture ten times its size
(the time does not depend on what the weights say).

    python benchmarks/kv_cache.py
    python benchmarks/kv_cache.py --repetitions 15 --threads 1
    python benchmarks/kv_cache.py --quick     # Nano only
"""

import statistics
from typing import Annotated

import typer
from support.random_model import random_model
from support.report import JsonFile, Quick, Threads, publish
from support.rounds import Ratio, in_turns
from support.talk import CHARACTER

import helpers
from helpers.characters.dialogues import load_dialogues
from helpers.chat.fitting import encode_prompt

TURN_TOKENS = 28  # about what one more turn adds to the prompt
REPLY = {"do_sample": False, "min_new_tokens": 12, "max_new_tokens": 12}


def main(
    history_tokens: Annotated[int, typer.Option(min=300, help="Length of the prompt half-way, in tokens.")] = 1500,
    repetitions: Annotated[int, typer.Option(min=7, help="Turns measured, each in both ways.")] = 11,
    threads: Threads = 0,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    """Print the time to the first token with the cache kept and with the prompt computed anew."""
    repetitions = 7 if quick else repetitions
    nano, tokenizer = helpers.load("nano", device_map="cpu", dtype="float32")
    models = {"Nano": nano} if quick else {"Nano": nano, "random": random_model(len(tokenizer))}
    rows, ratios = [], {}
    for name, model in models.items():
        seconds, tokens = measure(model, tokenizer, history_tokens, repetitions)
        times = (f"{statistics.median(each) * 1000:.1f} ms" for each in seconds.values())
        rows.append([name, f"{model.num_parameters() / 1e6:.1f}M", str(tokens), *times])
        ratios[f"{name}: first token, cache kept against computed anew"] = Ratio.of(seconds["anew"], seconds["kept"])
    publish(
        "每轮保留 KV cache，首个 token 快多少？How much sooner does a reply begin with the KV cache kept?",
        ["model", "parameters", "prompt tokens", "cache kept", "computed anew"],
        rows,
        ratios=ratios,
        setting=f"median of {repetitions} turns, CPU, float32",
        json_file=json_file,
    )


def measure(model, tokenizer, history_tokens: int, repetitions: int) -> tuple[dict, int]:
    """Seconds to the first token, turn by turn (cache kept, computed anew), and the median prompt length."""
    session = helpers.ChatSession(model, tokenizer, helpers.get_character(CHARACTER), **REPLY)
    queries = fill_history(session, tokenizer, history_tokens - TURN_TOKENS * (repetitions // 2 + 1))
    session.send(queries.pop())  # fills the cache, as the turn before would have
    lengths = []

    def kept(turn: tuple[str, list]) -> float:
        session.send(turn[0])
        lengths.append(session.statistics["prompt_tokens"])
        return session.statistics["time_to_first_token"]

    def anew(turn: tuple[str, list]) -> float:
        fresh = helpers.ChatSession(model, tokenizer, session.session_meta, **REPLY)
        fresh.history = turn[1]
        fresh.send(turn[0])
        return fresh.statistics["time_to_first_token"]

    turns = ((queries.pop(), list(session.history)) for _ in range(repetitions))
    return in_turns({"kept": kept, "anew": anew}, turns), int(statistics.median(lengths))


def fill_history(session, tokenizer, tokens: int) -> list[str]:
    """Put real exchanges into the history until the prompt has `tokens` tokens; return the queries left over."""
    dialogues = [d for d in load_dialogues() if d.card.bot_name == CHARACTER]
    exchanges = [list(entry) for d in dialogues for entry in d.history if entry[0]]
    while len(encode_prompt(tokenizer, session.session_meta, "你好", session.history)) < tokens:
        session.history.append(exchanges.pop())
    return [query for query, _ in exchanges]


if __name__ == "__main__":
    typer.run(main)
