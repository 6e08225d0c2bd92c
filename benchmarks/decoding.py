"""Which way of decoding is fastest on this machine, and what does it cost in memory and in quality?

Measured: tokens per second after the first, of greedy replies to the prompts of shipped dialogues, every way in one run,
in alternating order, after a warm-up; how many replies have the tokens of the plain way; the perplexity on held-out
dialogues; the memory of the weights; and the seconds of the first reply, in which a model is compiled. On CharacterGLM-Nano and on a random model ten times its size (whose perplexity says nothing). Ways: plain; int8
and nf4, `load(quantization=...)`; compiled, `load(compile=True)`; and two that this project does not offer: prompt
lookup (guess that the text repeats itself) and assisted decoding (Nano guesses for the random model; not for itself).

    python benchmarks/decoding.py
    python benchmarks/decoding.py --quick --json decoding.json
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from support.random_model import save_random_model
from support.report import JsonFile, Quick, publish
from support.rounds import Ratio, in_turns
from support.talk import Clock, prompts

import helpers
from helpers.characters.dialogues import load_dialogues
from helpers.chat.compat import compile_config
from helpers.chat.generation import NEUTRAL
from helpers.finetune import encode_samples, perplexity
from helpers.model.kv_cache import new_cache
from helpers.model.loading import NANO_DIR

LOADED = {"plain": {}, "int8": {"quantization": "int8"}, "nf4": {"quantization": "nf4"}, "compiled": {"compile": True}}


def main(
    repetitions: Annotated[int, typer.Option(min=3, help="Replies measured, each in every way.")] = 7,
    tokens: Annotated[int, typer.Option(min=8, help="Length of a reply.")] = 96,
    dialogues: Annotated[int, typer.Option(min=1, help="Held-out dialogues for the perplexity.")] = 60,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    """Print speed, perplexity and memory of every way."""
    if quick:
        repetitions, tokens, dialogues = 3, 32, 12
    rows, ratios = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ["Nano"] if quick else ["Nano", "random"]:
            directory = NANO_DIR if name == "Nano" else save_random_model(Path(folder))
            measured = measure(directory, name, repetitions, tokens, dialogues)
            for way, figures in measured.items():
                if way != "plain":
                    ratios[f"{name}, {way}, against plain"] = Ratio.of(figures["speeds"], measured["plain"]["speeds"])
                rows.append([name, way, f"{statistics.median(figures['speeds']):.0f}", *figures["texts"]])
    publish(
        "哪种解码最快，代价是什么？Which way of decoding is fastest, and at what cost?",
        ["model", "way", "tokens/s", "same tokens", "perplexity", "weights MiB", "first reply s"],
        rows,
        ratios=ratios,
        setting=f"float32, medians of {repetitions} replies of {tokens} tokens",
        json_file=json_file,
    )


def measure(directory: Path, name: str, repetitions: int, tokens: int, dialogues: int) -> dict[str, dict]:
    """For every way: tokens per second of every reply, and the texts of the other columns."""
    ways, models, tokenizer = load_ways(directory, name, tokens)
    first, *asked = prompts(tokenizer, repetitions + 1)
    begins = {way: decode(first)["seconds"] for way, decode in ways.items()}  # warm-up
    replies = in_turns(ways, asked)
    quality = perplexities(models, tokenizer, dialogues) if name == "Nano" else {}
    result = {}
    for way in ways:
        same = sum(own["ids"] == plain["ids"] for own, plain in zip(replies[way], replies["plain"]))
        size = models.get(way, models["plain"]).get_memory_footprint() / 2**20
        texts = [f"{same} of {repetitions}", quality.get(way, ""), f"{size:.1f}", f"{begins[way]:.1f}"]
        result[way] = {"speeds": [reply["speed"] for reply in replies[way]], "texts": texts}
    return result


def perplexities(models: dict, tokenizer, dialogues: int) -> dict[str, str]:
    """Perplexity of every model on held-out dialogues, spread over all characters."""
    held_out = [dialogue for dialogue in load_dialogues() if dialogue.held_out]
    rows = encode_samples(tokenizer, held_out[:: max(1, len(held_out) // dialogues)])
    return {way: f"{perplexity(model, rows):.2f}" for way, model in models.items()}


def load_ways(directory: Path, name: str, tokens: int) -> tuple[dict[str, Callable], dict, object]:
    """(functions that decode so many tokens, the models behind the loaded ways, the tokenizer)."""
    loaded = {way: helpers.load(directory, dtype="float32", **options) for way, options in LOADED.items()}
    models, tokenizer = {way: model for way, (model, _) in loaded.items()}, loaded["plain"][1]
    ways: dict[str, Callable] = {way: decoder(model, tokens) for way, model in models.items()}
    ways["prompt lookup"] = decoder(models["plain"], tokens, prompt_lookup_num_tokens=5)
    if name != "Nano":
        nano, _ = helpers.load("nano", dtype="float32")
        ways["assisted by Nano"] = decoder(models["plain"], tokens, assistant_model=nano)
    return ways, models, tokenizer


def decoder(model, tokens: int, **guessing) -> Callable:
    """A function that writes exactly so many greedy tokens: their ids, all the seconds, and the speed after the first."""

    def decode(prompt: list[int]) -> dict:
        start, clock, ids = time.perf_counter(), Clock(), torch.tensor([prompt], device=model.device)
        settings = {"do_sample": False, **NEUTRAL, "repetition_penalty": 1.0, "pad_token_id": 0, **guessing}
        if not guessing:  # as `chat` does
            cache = new_cache(model)
            cache.reuse(prompt)
            settings |= {
                "past_key_values": cache.key_values,
                "compile_config": compile_config(model.device) if cache.compiled else None,
            }
        lengths = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **lengths, **settings)
        reply = output[0, len(prompt) :].tolist()
        return {"ids": reply, "seconds": time.perf_counter() - start, "speed": clock.speed()}

    return decode


if __name__ == "__main__":
    typer.run(main)
