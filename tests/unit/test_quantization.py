"""Weights in 8 and 4 bits: smaller, nearly as good, saved and loaded again unchanged, and a base for LoRA."""

import math
import subprocess
import sys
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse
from peft import get_peft_model_state_dict
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import helpers
from helpers.characters.dialogues import load_dialogues
from helpers.cli.app import app
from helpers.errors import HelpersError
from helpers.finetune import add_lora, continue_lora, encode_samples, finetune, perplexity
from helpers.inspect.estimate import weight_bytes
from helpers.model.adapters import base_fingerprint

GREEDY = {"do_sample": False, "max_new_tokens": 24}
SHORT = {"max_steps": 4, "learning_rate": 5e-3, "logging_steps": 1, "per_device_train_batch_size": 4}
STEPS = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 4, "eval_steps": 4}
IDS = torch.arange(300, 340)[None]


@pytest.fixture(scope="module")
def plain():
    return helpers.load("nano", dtype="float32", device_map="cpu")


@pytest.fixture(scope="module", params=["int8", "nf4"])
def quantized(request):
    """Nano, from its original two `.bin` files."""
    model, tokenizer = helpers.load("nano", dtype="float32", device_map="cpu", quantization=request.param)
    return SimpleNamespace(kind=request.param, model=model, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def rows(plain):
    """(training, held out): short sequences."""
    held_out = [dialogue for dialogue in load_dialogues() if dialogue.held_out]
    encoded = sorted(encode_samples(plain[1], held_out), key=lambda row: len(row["input_ids"]))
    return encoded[8:24], encoded[:8]


def test_memory_is_what_the_planner_says(plain, quantized):
    size = quantized.model.get_memory_footprint()
    assert size < 0.6 * plain[0].get_memory_footprint()
    assert size == pytest.approx(weight_bytes(plain[0].config, 4, quantized.kind), rel=0.01)


def test_every_part_of_the_fused_weight_is_there(plain, quantized):
    """A quantiser that loses the split of query_key_value leaves k and v random."""
    sizes = {"int8": 0.02, "nf4": 0.2}
    inputs = torch.randn(50, plain[0].config.hidden_size, generator=torch.Generator().manual_seed(0))
    for ours, exact in zip(quantized.model.model.layers, plain[0].model.layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            width = getattr(exact.self_attn, name).in_features
            wanted = getattr(exact.self_attn, name)(inputs[:, :width])
            error = (getattr(ours.self_attn, name)(inputs[:, :width]) - wanted).norm() / wanted.norm()
            assert error < sizes[quantized.kind], name


def test_perplexity_is_close(plain, quantized, rows):
    losses = [math.log(perplexity(model, rows[1])) for model in (quantized.model, plain[0])]
    assert losses[0] == pytest.approx(losses[1], rel={"int8": 0.007, "nf4": 0.05}[quantized.kind])


def test_replies_are_text_and_the_kept_cache_changes_nothing(quantized):
    session = helpers.ChatSession(quantized.model, quantized.tokenizer, helpers.get_character("苏梦远"), **GREEDY)
    for query in ("你好呀，小苏", "最近怎么样？"):
        history = [list(entry) for entry in session.history]
        reply, _ = helpers.chat(quantized.model, quantized.tokenizer, session.session_meta, query, history, **GREEDY)
        assert session.send(query) == reply
        assert sum("\u4e00" <= letter <= "\u9fff" for letter in reply) >= 4


def test_a_saved_copy_computes_the_same(quantized, tmp_path):
    quantized.model.save_pretrained(tmp_path)
    quantized.tokenizer.save_pretrained(tmp_path)
    again, _ = helpers.load(tmp_path, dtype="float32", device_map="cpu")
    assert torch.equal(again(IDS).logits, quantized.model(IDS).logits)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, again(IDS).logits)


@pytest.mark.slow
def test_lora_learns_on_a_quantised_base(quantized, rows, tmp_path):
    base, tokenizer = helpers.load("nano", dtype="float32", device_map="cpu", quantization=quantized.kind)
    torch.manual_seed(0)
    tuned = add_lora(base)
    frozen = {name: weight.clone() for name, weight in base.named_parameters() if not weight.requires_grad}
    before = perplexity(tuned, rows[0])
    finetune(tuned, *rows, tmp_path, **SHORT, **STEPS)
    assert perplexity(tuned, rows[0]) < before
    assert all(torch.equal(weight, frozen[name]) for name, weight in base.named_parameters() if name in frozen)
    assert base_fingerprint(base) is None  # an adapter does not belong to one precision
    again, _ = helpers.load("nano", dtype="float32", device_map="cpu", quantization=quantized.kind, adapter=tmp_path)
    assert get_peft_model_state_dict(again).keys() == get_peft_model_state_dict(tuned).keys()
    assert torch.allclose(again(IDS).logits, tuned.eval()(IDS).logits, atol=1e-4)
    so_far = perplexity(again, rows[0])
    onward = continue_lora(again, tmp_path)
    assert torch.allclose(onward.eval()(IDS).logits, tuned.eval()(IDS).logits, atol=1e-4)
    finetune(onward, *rows, tmp_path / "onward", **SHORT, **STEPS)
    assert perplexity(onward, rows[0]) < so_far
    full, _ = helpers.load("nano", dtype="float32", device_map="cpu", adapter=tmp_path)
    assert perplexity(full, rows[0]) < before


@pytest.fixture
def cpu_with_bfloat16(monkeypatch):
    """bitsandbytes as on a CPU with AVX512-BF16, where `Linear4bit` repacks its weights when it is used for inference.

    On such a CPU nothing is replaced. On others feature detection says yes, and the repacking is bitsandbytes' own (plain
    torch); replaced is only the kernel that multiplies with repacked weights, as it needs that CPU's instructions. It is
    registered where the native one is, so that torch treats it alike: as an operation without gradients.
    """
    if bitsandbytes.functional.has_avx512bf16():
        yield
        return
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    kernels = torch.library.Library("bitsandbytes", "IMPL")
    kernels.impl("gemv_4bit", multiply_repacked, "CPU", allow_override=True)
    yield
    kernels._destroy()


def multiply_repacked(x, packed, shape, absmax, code, blocksize):
    """x W^T for W of `shape` [N, K], repacked by bitsandbytes, with `absmax` of the shape [K / blocksize, N].

    The native kernel writes through pointers into `out` and returns a view of it: autograd sees nothing but the view.
    """
    state = SimpleNamespace(
        packing_format_for_cpu=True, original_qshape=(-1, 1), original_nested=False, original_dtype=None
    )
    with torch.no_grad():
        weight, _ = _convert_weight_packed_for_cpu_inverse(packed, state)
        scales = absmax.T.reshape(-1).float()
        weight = torch.ops.bitsandbytes.dequantize_4bit(weight, scales, blocksize, "nf4", shape, torch.float32)
        out = (x.flatten(0, -2).to(torch.bfloat16) @ weight.T.to(torch.bfloat16)).to(x.dtype)
    return out.reshape(*x.shape[:-1], shape[0])


@pytest.mark.usefixtures("cpu_with_bfloat16")
def test_a_4_bit_model_can_be_trained_after_inference():
    """Without gradients first, as in an evaluation: that is when bitsandbytes repacks."""
    model, _ = helpers.load("nano", dtype="float32", device_map="cpu", quantization="nf4")
    stored = {name: weight.clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        before = model(IDS).logits
    assert all(torch.equal(weight, stored[name]) for name, weight in model.named_parameters())
    tuned = add_lora(model).train()
    tuned(IDS, labels=IDS).loss.backward()
    assert all(weight.grad is not None for name, weight in tuned.named_parameters() if "lora_B" in name)
    assert torch.equal(tuned.eval()(IDS).logits, before), "a new adapter changes nothing"


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_with_bfloat16")
def test_a_4_bit_model_can_be_trained_after_an_evaluation(rows, tmp_path):
    model, _ = helpers.load("nano", dtype="float32", device_map="cpu", quantization="nf4")
    before = perplexity(model, rows[0])  # as notebook 04 does it: on the base first
    torch.manual_seed(0)
    tuned = add_lora(model)
    finetune(tuned, *rows, tmp_path, **SHORT, **STEPS)  # it evaluates before the first step
    assert perplexity(tuned, rows[0]) < before


def test_the_terminal_chats_with_a_quantised_model(capfd):
    arguments = ["--model", "nano", "--quantization", "int8", "--no-do-sample", "--once", "你好"]
    done = CliRunner().invoke(app, ["chat", *arguments])
    assert (done.exit_code, len(done.stdout.splitlines())) == (0, 1), done.output
    # bitsandbytes would say it for every layer and token
    assert "MatMul8bitLt" not in done.output + "".join(capfd.readouterr())


def test_no_advice_of_others_to_fetch_a_kernel():
    """PEFT imports bitsandbytes, which on a CPU with AVX512-BF16 asks for `kernels`: native code from a hub."""
    command = [sys.executable, "-c", "import helpers, bitsandbytes"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "kernels" not in done.stdout + done.stderr


def test_quantized_and_compiled_is_refused_by_the_command():
    refused = CliRunner().invoke(app, ["chat", "--model", "nano", "--quantization", "nf4", "--compile"])
    assert isinstance(refused.exception, HelpersError)  # main() prints it as one line
    assert "cannot compile a quantised model" in str(refused.exception)
