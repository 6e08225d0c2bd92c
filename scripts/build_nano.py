"""Build CharacterGLM-Nano: train its tokenizer and its weights from `data/dialogues/`, and write `data/nano/`.

    python scripts/build_nano.py                # about half an hour on two CPU cores
    python scripts/build_nano.py --epochs 1 --output-dir /tmp/nano    # a quick trial

Nano is a teaching stand-in for CharacterGLM-6B: the same architecture, file layout and prompt, a thousandth of the
size. It speaks only about what its few thousand training lines speak about.
"""

import io
import json
import math
import random
import shutil
import time
from pathlib import Path

import sentencepiece
import torch
import typer
from original_layout import write_original_layout
from transformers import AutoTokenizer, GenerationConfig

from helpers.characters.dialogues import Dialogue, history_to_messages, load_dialogues
from helpers.characters.personas import SessionMeta
from helpers.chat.generation import STOP_IDS
from helpers.model.loading import NANO_DIR
from helpers.model.modeling import CharacterGLMConfig, CharacterGLMForCausalLM
from helpers.model.tokenization import NEWLINE_ID

PIECES = 4084  # with 5 control tokens and padding to a multiple of 64: a vocabulary of 4096
CONTEXT = 2048
TOKENS_PER_BATCH = 4096
DROPOUT = 0.1  # a model this small still has more parameters than there are tokens to learn from
IGNORED = -100
# So little a model does not bear the vendor's bold sampling (temperature 0.9, repetition_penalty 1.3).
SAMPLING = {"do_sample": True, "temperature": 0.35, "top_p": 0.9, "top_k": 100, "repetition_penalty": 1.05}


def train_tokenizer(dialogues: list[Dialogue], directory: Path) -> None:
    """Train `tokenizer.model`: the format of CharacterGLM's (BPE, byte fallback, newline is id 13), fewer pieces."""
    texts = [text for d in dialogues for entry in d.history for text in entry if text]
    texts += [text for d in dialogues for text in d.card.model_dump().values() if text]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts + ["以下是一段和之间的对话。", "关于的信息：", "[", "]"] * 50),
        model_writer=model,  # a file of its own would carry the path it was written to
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        num_threads=2,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "ChatGLMTokenizer", "remove_space": False, "do_lower_case": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def new_model(tokenizer) -> CharacterGLMForCausalLM:
    """A fresh model of about 5 million parameters."""
    config = CharacterGLMConfig(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
    )
    model = CharacterGLMForCausalLM(config)
    # Tied while training: half as much to learn from little text. The file layout keeps two (equal) matrices.
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def add_dropout(model, probability: float) -> None:
    """Dropout on the embeddings and on the output of every attention and MLP block; GLM itself has none there."""

    def drop(module, inputs, output):
        return torch.nn.functional.dropout(output, probability, model.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def vary_persona(card: SessionMeta, rng: random.Random) -> SessionMeta:
    """Leave parts of a persona out at random, so that the model does not depend on its exact wording."""
    sentences = [sentence for sentence in card.bot_info.split("。") if sentence]
    kept = [sentence for sentence in sentences if rng.random() > 0.2]
    user_info = card.user_info if rng.random() > 0.2 else ""
    bot_info = "".join(f"{sentence}。" for sentence in kept) if rng.random() < 0.5 else card.bot_info
    return SessionMeta(bot_name=card.bot_name, user_name=card.user_name, bot_info=bot_info, user_info=user_info)


def epoch_samples(dialogues: list[Dialogue], tokenizer, rng: random.Random) -> list[tuple[list[int], list[int]]]:
    """One pass over the dialogues as (ids, labels): one in five alone, the others joined to longer conversations.

    Joined conversations teach long contexts. A conversation that begins with a greeting only begins a sample.
    """
    samples = []
    by_character: dict[str, list[Dialogue]] = {}
    for dialogue in rng.sample(dialogues, len(dialogues)):
        by_character.setdefault(dialogue.card.bot_name, []).append(dialogue)
    for group in by_character.values():
        while group:
            dialogue = group.pop()
            history = list(dialogue.history)
            target = rng.choice([0, 6, 12, 25, 60])  # exchanges
            while group and len(history) < target and group[-1].history[0][0]:
                history += group.pop().history
            samples.append(encode_sample(vary_persona(dialogue.card, rng), history, tokenizer))
    return samples


def encode_sample(card: SessionMeta, history, tokenizer) -> tuple[list[int], list[int]]:
    """Ids and labels of one conversation; the persona carries no loss, both sides of the talk do."""
    ids = tokenizer.apply_chat_template(history_to_messages(history), session_meta=card)["input_ids"][:CONTEXT]
    persona_lines = 1 + bool(card.bot_info) + bool(card.user_info)
    newlines = [position for position, token in enumerate(ids) if token == NEWLINE_ID]
    start = newlines[persona_lines - 1] + 1
    return ids, [IGNORED] * start + ids[start:]


def batches(samples, rng: random.Random) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Group samples of similar length into batches of about `TOKENS_PER_BATCH` tokens, padded on the right."""
    samples = sorted(samples, key=lambda sample: len(sample[0]) + rng.random() * 16)
    groups, group = [], []
    for sample in samples:
        if group and len(sample[0]) * (len(group) + 1) > TOKENS_PER_BATCH:
            groups.append(group)
            group = []
        group.append(sample)
    groups.append(group)
    rng.shuffle(groups)
    return [(pad([ids for ids, _ in g], 0), pad([labels for _, labels in g], IGNORED)) for g in groups]


def pad(rows: list[list[int]], value: int) -> torch.Tensor:
    """Rows of different length as one tensor, filled up on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def train(model, dialogues, held_out, tokenizer, epochs: int, learning_rate: float, seed: int) -> list[dict]:
    """AdamW with warm-up and cosine decay. Keeps the last weights; returns a log line per epoch."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    steps_per_epoch = len(batches(epoch_samples(dialogues, tokenizer, random.Random(0)), rng))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=int(steps_per_epoch * epochs * 1.05), pct_start=0.05
    )
    log, start = [], time.perf_counter()
    for epoch in range(1, epochs + 1):
        losses = []
        for ids, labels in batches(epoch_samples(dialogues, tokenizer, rng), rng):
            loss = model.train()(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        log.append({"epoch": epoch, "loss": sum(losses) / len(losses), "seconds": time.perf_counter() - start})
        if epoch % 2 == 0 or epoch == epochs:
            log[-1]["held_out_perplexity"] = reply_perplexity(model, held_out, tokenizer)
        print(" ".join(f"{key} {value:.4g}" for key, value in log[-1].items()), flush=True)
    return log


@torch.no_grad()
def reply_perplexity(model, dialogues: list[Dialogue], tokenizer) -> float:
    """Perplexity of the replies (and the newlines that end them), given persona and conversation so far."""
    total, count = 0.0, 0
    for dialogue in dialogues:
        ids, mask = reply_mask(dialogue, tokenizer)
        labels = torch.where(mask.bool(), ids, IGNORED)
        loss = model.eval()(input_ids=ids[None], labels=labels[None]).loss.item()
        total, count = total + loss * mask.sum().item(), count + mask.sum().item()
    return math.exp(total / count)


def unigram_perplexity(train_set: list[Dialogue], held_out: list[Dialogue], tokenizer) -> float:
    """Perplexity of the same replies if every token is guessed by its frequency in the training replies (add one)."""
    counts = torch.ones(len(tokenizer))
    for dialogue in train_set:
        ids, mask = reply_mask(dialogue, tokenizer)
        counts += torch.bincount(ids[mask.bool()], minlength=len(tokenizer))
    log_probability = (counts / counts.sum()).log()
    tokens = torch.cat([ids[mask.bool()] for ids, mask in (reply_mask(d, tokenizer) for d in held_out)])
    return math.exp(-log_probability[tokens].mean().item())


def reply_mask(dialogue: Dialogue, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of a dialogue and 1 for every token of a reply."""
    encoded = tokenizer.apply_chat_template(
        dialogue.messages, session_meta=dialogue.card, return_assistant_tokens_mask=True
    )
    return torch.tensor(encoded["input_ids"][:CONTEXT]), torch.tensor(encoded["assistant_masks"][:CONTEXT])


def main(
    output_dir: Path = NANO_DIR, epochs: int = 14, learning_rate: float = 2e-3, seed: int = 0, threads: int = 2
) -> None:
    """Train tokenizer and model and write them in CharacterGLM's original layout."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    dialogues = load_dialogues()
    train_set = [d for d in dialogues if not d.held_out]
    held_out = [d for d in dialogues if d.held_out]
    work = output_dir.with_name(output_dir.name + ".partial")  # data/nano stays usable until the new one is complete
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    train_tokenizer(train_set, work)
    (work / "config.json").write_text('{"model_type": "chatglm"}')
    tokenizer = AutoTokenizer.from_pretrained(work)
    model = new_model(tokenizer)
    add_dropout(model, DROPOUT)
    print(f"{len(train_set)} + {len(held_out)} dialogues, {model.num_parameters():,} parameters")
    log = train(model, train_set, held_out, tokenizer, epochs, learning_rate, seed)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # two matrices again
    write_original_layout(model, work)
    GenerationConfig(**SAMPLING, max_new_tokens=512, eos_token_id=STOP_IDS, pad_token_id=0).save_pretrained(work)
    result = {
        "dialogues": {"training": len(train_set), "held_out": len(held_out)},
        "parameters": model.num_parameters(),
        "held_out_perplexity": log[-1]["held_out_perplexity"],
        "unigram_perplexity": unigram_perplexity(train_set, held_out, tokenizer),
        "training_seconds": time.perf_counter() - start,
        "epochs": log,
    }
    (work / "training_log.json").write_text(json.dumps(result, indent=1) + "\n")
    for file in work.iterdir():
        output_dir.mkdir(exist_ok=True)
        shutil.move(str(file), output_dir / file.name)
    work.rmdir()
    print(f"held-out perplexity {result['held_out_perplexity']:.1f}, unigram {result['unigram_perplexity']:.1f}")


if __name__ == "__main__":
    typer.run(main)
