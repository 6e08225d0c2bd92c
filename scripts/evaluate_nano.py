"""Measure what CharacterGLM-Nano can do; the figures in its model card come from here.

python scripts/evaluate_nano.py             # about a minute; --json FILE keeps the figures
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from build_nano import reply_perplexity, unigram_perplexity
from rich.console import Console
from rich.table import Column, Table

import helpers
from helpers.characters.dialogues import load_dialogues

SCRIPTED_QUESTIONS = ("你好呀，小苏", "最近对音乐有什么新的想法吗", "那我们商量一下下一部音乐电影的拍摄，好嘛？")
GREETING = "你好，最近怎么样？"
MAX_TOKENS = 80


def split_dialogues():
    """(training, held-out) dialogues."""
    dialogues = load_dialogues()
    return [d for d in dialogues if not d.held_out], [d for d in dialogues if d.held_out]


def scripted_conversation(model, tokenizer, seed: int) -> list[list[str]]:
    """The three questions of notebook 01, as one conversation with 苏梦远."""
    card, history = helpers.get_character("苏梦远"), []
    for question in SCRIPTED_QUESTIONS:
        _, history = helpers.chat(model, tokenizer, card, question, history, seed=seed, max_new_tokens=128)
    return history


def greet_characters(model, tokenizer, seed: int, count: int = 8) -> dict[str, str]:
    """What `count` characters answer to one and the same greeting."""
    cards = list(helpers.load_characters().values())[:count]
    return {c.bot_name: helpers.chat(model, tokenizer, c, GREETING, seed=seed, max_new_tokens=128)[0] for c in cards}


def held_out_prompts(held_out, count: int = 100) -> list[tuple]:
    """(card, history so far, query) of `count` held-out user lines, spread evenly over all of them."""
    lines = [(d.card, d.history[:turn], query) for d in held_out for turn, (query, _) in enumerate(d.history) if query]
    return [lines[position * len(lines) // count] for position in range(count)]


def reply_endings(model, tokenizer, prompts, seed: int) -> list[tuple[str, bool]]:
    """(reply, whether it is not empty and ended by itself within 80 tokens) for each prompt, at default sampling."""
    endings = []
    for card, history, query in prompts:
        session = helpers.ChatSession(model, tokenizer, helpers.SessionMeta(**card.model_dump()))
        session.history = [list(entry) for entry in history]
        reply = session.send(query, seed=seed, max_new_tokens=MAX_TOKENS)
        endings.append((reply, bool(reply) and session.statistics["ended_by_itself"]))
    return endings


def evaluate(model, tokenizer, seed: int = 0) -> dict:
    """All figures of the model card."""
    train_set, held_out = split_dialogues()
    endings = reply_endings(model, tokenizer, held_out_prompts(held_out), seed)
    greetings = greet_characters(model, tokenizer, seed)
    return {
        "held_out_perplexity": reply_perplexity(model, held_out, tokenizer),
        "unigram_perplexity": unigram_perplexity(train_set, held_out, tokenizer),
        "ended_by_itself": sum(ended for _, ended in endings),
        "held_out_lines": len(endings),
        "distinct_greetings": len(set(greetings.values())),
        "greeted_characters": len(greetings),
        "greetings": greetings,
        "scripted_conversation": scripted_conversation(model, tokenizer, seed),
    }


def show(figures: dict) -> None:
    """Print the figures as tables."""
    table = Table("measure", "value", title="CharacterGLM-Nano")
    for name, value in figures.items():
        if isinstance(value, int | float):
            table.add_row(name, f"{value:.4g}")
    talk = Table(
        Column("who", overflow="fold"),
        Column("says", overflow="fold"),
        title="scripted conversation; one greeting, eight characters",
    )
    for query, response in figures["scripted_conversation"]:
        talk.add_row(query, response)
    for name, response in figures["greetings"].items():
        talk.add_row(name, response)
    Console().print(table, talk)


def main(
    model: str = "nano",
    seed: int = 0,
    threads: int = 2,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Load a model, measure it, print the figures."""
    torch.set_num_threads(threads)
    figures = evaluate(*helpers.load(model), seed=seed)
    show(figures)
    if json_file:
        json_file.write_text(json.dumps(figures, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
