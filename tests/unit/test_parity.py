"""The network and the prompt against what the original modelling code computed (float32, random weights)."""

import json

import numpy as np
import pytest
import torch
from reference import COMPACT, shared
from transformers import AutoModelForCausalLM, AutoTokenizer

import helpers  # noqa: F401 - registers the family

GOLDEN = np.load(COMPACT / "golden.npz")
LENGTHS = sorted(int(name.removeprefix("input_ids_")) for name in GOLDEN if name.startswith("input_ids_"))
LOSS_LENGTHS = [length for length in LENGTHS if f"loss_{length}" in GOLDEN]
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def compact(request):
    return AutoModelForCausalLM.from_pretrained(COMPACT, dtype=torch.float32, attn_implementation=request.param)


@pytest.fixture(scope="module")
def real():
    directory = shared("golden/real_tokenizer")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    cases = json.loads((directory / "golden.json").read_text(encoding="utf-8"))
    logits = np.load(directory / "golden_logits.npz")
    return model, AutoTokenizer.from_pretrained(directory), cases, logits


def prompt_of(length: int) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[f"input_ids_{length}"])[None]


def difference(found: torch.Tensor, expected: np.ndarray) -> float:
    return (found - torch.from_numpy(expected)).abs().max().item()


def messages_of(case: dict) -> list[dict]:
    messages = []
    for query, response in case["history"]:
        if query:
            messages.append({"role": "user", "content": query})
        messages.append({"role": "assistant", "content": response})
    return [*messages, {"role": "user", "content": case["query"]}]


def test_the_golden_file_covers_short_and_long_prompts():
    assert min(LENGTHS) == 1 and max(LENGTHS) >= 600 and len(LOSS_LENGTHS) >= 2


@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_logits(compact, length):
    logits = compact(input_ids=prompt_of(length)).logits[0]
    assert difference(logits[-1], GOLDEN[f"last_logits_{length}"]) < TOLERANCE
    assert difference(logits.mean(0), GOLDEN[f"mean_logits_{length}"]) < TOLERANCE


@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_tokens(compact, length):
    output = compact.generate(prompt_of(length), do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert output[0, length:].tolist() == GOLDEN[f"greedy_{length}"].tolist()


@pytest.mark.parametrize("length", LOSS_LENGTHS)
@torch.no_grad()
def test_loss(compact, length):
    """Labels are the prompt with the first length // 2 positions masked; the model shifts them by one."""
    labels = prompt_of(length)
    labels[:, : length // 2] = -100
    loss = compact(input_ids=prompt_of(length), labels=labels).loss.item()
    assert loss == pytest.approx(float(GOLDEN[f"loss_{length}"]), abs=TOLERANCE)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(compact):
    lengths = [length for length in LENGTHS if length < 100]
    width = max(lengths) + 3
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in zip(ids, lengths):
        row[-length:] = prompt_of(length)[0]
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = compact(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
    for found, length in zip(logits, lengths):
        assert difference(found, GOLDEN[f"last_logits_{length}"]) < TOLERANCE


def test_real_prompts_are_rendered_identically(real):
    _, tokenizer, cases, _ = real
    for case in cases:
        rendered = tokenizer.apply_chat_template(
            messages_of(case), session_meta=case["session_meta"], add_generation_prompt=True, tokenize=False
        )
        assert rendered == case["prompt"]


def test_real_prompts_are_tokenized_identically(real):
    _, tokenizer, cases, _ = real
    assert {tuple(case["input_ids"][:2]) for case in cases} == {(64790, 64792)}  # [gMASK] sop
    for case in cases:
        encoded = tokenizer.apply_chat_template(
            messages_of(case), session_meta=case["session_meta"], add_generation_prompt=True
        )
        assert encoded["input_ids"] == case["input_ids"]
        assert tokenizer(case["prompt"])["input_ids"] == case["input_ids"]


@torch.no_grad()
def test_real_logits(real):
    model, _, cases, golden = real
    assert sorted(golden) == sorted(f"case{i}" for i in range(len(cases)))
    for number, case in enumerate(cases):
        logits = model(input_ids=torch.tensor([case["input_ids"]]), logits_to_keep=1).logits[0, -1]
        assert difference(logits, golden[f"case{number}"]) < TOLERANCE, f"case {number}"


def test_real_greedy_tokens(real):
    model, _, cases, _ = real
    for number, case in enumerate(cases):
        ids, expected = case["input_ids"], case["greedy_new_tokens"]
        output = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=len(expected), eos_token_id=None)
        assert output[0, len(ids) :].tolist() == expected, f"case {number}"
