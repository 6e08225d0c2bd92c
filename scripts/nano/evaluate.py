"""Measure what CharacterGLM-Nano can do, as far as a program can; the figures in its model card come from here.

PYTHONPATH=scripts python -m nano.evaluate             # a few minutes; --json FILE keeps the figures
"""

import json
import re
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Column, Table

import helpers
from helpers.characters.dialogues import load_dialogues

from .everyday import EVERYDAY, read_rows
from .lookups import memory_lookups, persona_lookups
from .voices import duets

SCRIPTED_QUESTIONS = ("你好呀，小苏", "最近对音乐有什么新的想法吗", "那我们商量一下下一部音乐电影的拍摄，好嘛？")
GREETING = "你好，最近怎么样？"
MAX_TOKENS = 80


def scripted_conversation(model, tokenizer, seed: int) -> list[list[str]]:
    """The three questions of notebook 01, as one conversation with 苏梦远."""
    card, history = helpers.get_character("苏梦远"), []
    for question in SCRIPTED_QUESTIONS:
        _, history = helpers.chat(model, tokenizer, card, question, history, seed=seed, max_new_tokens=128)
    return history


def greet_characters(model, tokenizer, seed: int) -> dict[str, str]:
    """What every character answers to one and the same greeting."""
    cards = helpers.load_characters().values()
    return {c.bot_name: helpers.chat(model, tokenizer, c, GREETING, seed=seed, max_new_tokens=128)[0] for c in cards}


def held_out_prompts(count: int = 100) -> list[tuple]:
    """(card, history so far, query) of `count` held-out user lines, spread evenly over all of them."""
    held_out = [d for d in load_dialogues() if d.held_out]
    lines = [(d.card, d.history[:turn], query) for d in held_out for turn, (query, _) in enumerate(d.history) if query]
    return [lines[position * len(lines) // count] for position in range(count)]


def reply_endings(model, tokenizer, prompts, seed: int) -> list[dict]:
    """Reply, whether it is not empty and ended by itself within 80 tokens, and its speed, at default sampling."""
    endings = []
    for card, history, query in prompts:
        session = helpers.ChatSession(model, tokenizer, helpers.SessionMeta(**card.model_dump()))
        session.history = [list(entry) for entry in history]
        reply = session.send(query, seed=seed, max_new_tokens=MAX_TOKENS)
        ended = bool(reply) and session.statistics["ended_by_itself"]
        endings.append({"reply": reply, "ended": ended, "speed": session.statistics["tokens_per_second"]})
    return endings


def training_replies() -> tuple[set[str], re.Pattern]:
    """Every reply of the training data: those without slots, and one pattern for all with slots."""
    replies = {reply for d in load_dialogues() if not d.held_out for _, reply in d.history}
    for file in [*(EVERYDAY / "replies").glob("*.jsonl"), EVERYDAY / "voices.jsonl"]:
        replies.update(text for row in read_rows(file) for text in row["replies"])
    replies.update(row["reply"] for row in read_rows(EVERYDAY / "topics.jsonl"))
    replies.update(line for row in read_rows(EVERYDAY / "duets.jsonl") for line in row["lines"])
    slotted = ["".join(re.sub(r"\\{\w+\\}", ".{1,12}", re.escape(text))) for text in replies if "{" in text]
    return replies, re.compile("|".join(slotted))


def verbatim_share(replies: list[str]) -> float:
    """The share of `replies` that stand word for word in the training data, slots apart."""
    known, slotted = training_replies()
    return sum(reply in known or bool(slotted.fullmatch(reply)) for reply in replies) / len(replies)


def evaluate(model, tokenizer, seed: int = 0) -> dict:
    """All figures of the model card, and the replies behind them."""
    endings = reply_endings(model, tokenizer, held_out_prompts(), seed)
    greetings = greet_characters(model, tokenizer, seed)
    personas = persona_lookups(model, tokenizer, seed)
    memories = memory_lookups(model, tokenizer, seed)
    talks = duets(model, tokenizer, seed)
    said = [wrong for talk in talks for wrong in talk["wrong"]]
    return {
        "ended_by_itself": sum(row["ended"] for row in endings),
        "held_out_lines": len(endings),
        "verbatim_share": verbatim_share([row["reply"] for row in endings]),
        "tokens_per_second": sorted(row["speed"] for row in endings)[len(endings) // 2],
        "distinct_greetings": len(set(greetings.values())),
        **{f"persona_{topic}": sum(row[0] for row in rows) / len(rows) for topic, rows in personas.items()},
        "memory_with_history": sum(row["with_history"] for row in memories) / len(memories),
        "memory_without_history": sum(row["alone"] for row in memories) / len(memories),
        "duet_lines": len(said),
        "duet_right_voice": said.count("") / len(said),
        "greetings": greetings,
        "scripted_conversation": scripted_conversation(model, tokenizer, seed),
        "details": {"personas": personas, "memories": memories, "duets": talks},
    }


def show(figures: dict) -> None:
    """Print the figures as tables."""
    table = Table("measure", "value", title="CharacterGLM-Nano")
    for name, value in figures.items():
        if isinstance(value, int | float):
            table.add_row(name, f"{value:.4g}")
    talk = Table(
        Column("who", overflow="fold"), Column("says", overflow="fold"), title="scripted conversation; a greeting"
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
    details: Annotated[Path | None, typer.Option(help="keep every question and reply here")] = None,
) -> None:
    """Load a model, measure it, print the figures."""
    torch.set_num_threads(threads)
    figures = evaluate(*helpers.load(model), seed=seed)
    show(figures)
    behind = figures.pop("details")
    for file, content in ((json_file, figures), (details, behind)):
        if file:
            file.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
