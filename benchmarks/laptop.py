"""How small and how fast is a model in llama.cpp, and what does it lose on the way?

Measured on one thread: the file, the CPU time of a token after the prompt has been read, how many greedy replies have the
tokens of `helpers.chat` in float32, and the perplexity on held-out dialogues, by llama.cpp's own computation. GGUF in F16,
Q8_0 and Q4_K_M, and this project in bfloat16 beside them in the same run, in alternating order. On CharacterGLM-Nano, and
on a random model of 300 million parameters (its words mean nothing: speed and size only). What 4 bits do to the real 6B
is not measured.

Needs xllamacpp (requirements-dev.txt); Q4_K_M also needs llama-quantize on the PATH (docs/laptop.md says where to get it).

    python benchmarks/laptop.py
    python benchmarks/laptop.py --quick --json laptop.json
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from support.llama_server import LlamaServer, to_q4_k_m
from support.random_model import save_random_model
from support.report import JsonFile, Quick, publish
from support.rounds import Ratio, in_turns
from support.talk import Clock, prompts

import helpers
from helpers.characters.dialogues import load_dialogues
from helpers.chat.generation import NEUTRAL, STOP_IDS
from helpers.finetune import encode_samples, perplexity
from helpers.model.loading import NANO_DIR

OURS = "helpers bfloat16"
RANDOM_SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 26, "num_attention_heads": 16}


def main(
    replies: Annotated[int, typer.Option(min=3, help="Replies measured, each in every way.")] = 15,
    tokens: Annotated[int, typer.Option(min=8, help="Length of a reply.")] = 48,
    dialogues: Annotated[int, typer.Option(min=1, help="Held-out dialogues for the perplexity.")] = 12,
    quick: Quick = False,
    json: JsonFile = None,
) -> None:
    """Print size, speed and loss of every kind."""
    if quick:
        replies, tokens, dialogues = 3, 32, 1
    torch.set_num_threads(1)
    rows, ratios = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ["Nano"] if quick else ["Nano", "random 300M"]:
            directory = (
                NANO_DIR
                if name == "Nano"
                else save_random_model(Path(folder) / "random", torch.bfloat16, **RANDOM_SHAPE)
            )
            for way, figures in measure(directory, Path(folder), replies, tokens, dialogues).items():
                rows.append([name, way, *figures["texts"]])
                if way != OURS:
                    ratios[f"{name}, {way}, CPU time of a token against {OURS}"] = figures["ratio"]
    publish(
        "llama.cpp 里的模型多小、多快，损失多少？How small and fast is a model in llama.cpp, and what does it lose?",
        ["model", "way", "MB", "CPU ms/token", "lowest - highest", "same replies", "perplexity"],
        rows,
        ratios=ratios,
        setting=f"one thread, medians of {replies} replies of {tokens} tokens",
        json_file=json,
    )


def measure(directory: Path, folder: Path, replies: int, tokens: int, dialogues: int) -> dict[str, dict]:
    """For every way: its speed against ours in bfloat16, and the texts of the columns."""
    own, tokenizer = helpers.load(directory, dtype="bfloat16")
    files = gguf_files(directory, folder)
    servers = {kind: LlamaServer(file) for kind, file in files.items()}
    asked = prompts(tokenizer, replies)
    seconds = measure_seconds(own, servers, asked, tokens)
    sizes = {OURS: sum(tensor.nbytes for tensor in own.state_dict().values())}
    sizes |= {kind: file.stat().st_size for kind, file in files.items()}
    is_nano = directory == NANO_DIR
    same = same_replies(own, servers, asked, tokens) if is_nano else {}
    lost = perplexities(own, servers, tokenizer, dialogues) if is_nano else {}
    found = {}
    for way, each in seconds.items():
        usual, low, high = (1000 * pick(each) for pick in (statistics.median, min, max))
        texts = [f"{sizes[way] / 1e6:.1f}", f"{usual:.2f}", f"{low:.2f} - {high:.2f}"]
        texts += [f"{same[way]} of {replies}", f"{lost[way]:.3f}"] if is_nano else ["", ""]
        found[way] = {"ratio": Ratio.of(seconds[OURS], each), "texts": texts}
    return found


def measure_seconds(own, servers: dict[str, LlamaServer], asked: list, tokens: int) -> dict[str, list[float]]:
    """CPU seconds of a token, way by way, for every prompt; the order alternates."""
    ways = {OURS: lambda prompt: decode(own, prompt, tokens)[1]}
    ways |= {kind: lambda prompt, server=server: server.seconds(prompt, tokens) for kind, server in servers.items()}
    return in_turns(ways, asked)


def same_replies(own, servers: dict[str, LlamaServer], asked: list, tokens: int) -> dict[str, int]:
    """How many greedy replies have the tokens of Nano in float32."""
    exact = helpers.load("nano", dtype="float32")[0]
    replies = {kind: lambda prompt, server=server: server.reply(prompt, tokens) for kind, server in servers.items()}
    replies[OURS] = lambda prompt: reply(own, prompt, tokens)
    expected = [reply(exact, prompt, tokens) for prompt in asked]
    return {way: sum(write(prompt) == ids for prompt, ids in zip(asked, expected)) for way, write in replies.items()}


def gguf_files(directory: Path, folder: Path) -> dict[str, Path]:
    """The model in every kind there is a tool for."""
    from helpers.export.gguf import export_gguf  # gguf is imported only where it is used

    files = {
        kind: export_gguf(directory, folder / f"{directory.name}-{kind}.gguf", kind=kind) for kind in ("f16", "q8_0")
    }
    if shutil.which("llama-quantize"):
        files["q4_k_m"] = to_q4_k_m(files["f16"], folder / f"{directory.name}-q4_k_m.gguf")
    else:
        print("没有 llama-quantize，不测 Q4_K_M [no quantiser: Q4_K_M left out]")
    return files


def perplexities(own, servers: dict[str, LlamaServer], tokenizer, dialogues: int) -> dict[str, float]:
    """Perplexity in every way on the same held-out dialogues, spread over all characters."""
    held_out = [dialogue for dialogue in load_dialogues() if dialogue.held_out]
    rows = encode_samples(tokenizer, held_out[:: max(1, len(held_out) // dialogues)][:dialogues])
    measured = {kind: server.perplexity(rows, len(tokenizer)) for kind, server in servers.items()}
    return {OURS: perplexity(own, rows), **measured}


def reply(model, prompt: list[int], tokens: int) -> list[int]:
    """As `LlamaServer.reply`."""
    ids = decode(model, prompt, tokens)[0]
    end = next((place for place, token in enumerate(ids) if token in STOP_IDS), len(ids))
    return ids[: end + 1]


def decode(model, prompt: list[int], tokens: int) -> tuple[list[int], float]:
    """The ids of exactly so many greedy tokens, and the CPU seconds of one after the first."""
    ids, clock = torch.tensor([prompt]), Clock(time.process_time)
    settings = {"do_sample": False, **NEUTRAL, "repetition_penalty": 1.0, "pad_token_id": 0, "eos_token_id": None}
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), streamer=clock, max_new_tokens=tokens, min_new_tokens=0, **settings
    )
    return output[0, len(prompt) :].tolist(), 1 / clock.speed()


if __name__ == "__main__":
    typer.run(main)
