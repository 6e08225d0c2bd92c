"""The planner: against the real numbers of models, against memory in use, and its refusals."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import helpers
from helpers.errors import HelpersError
from helpers.inspect.estimate import GGUF_BYTES, QUANTIZED_BYTES, lora_count, parameter_count, weight_bytes
from helpers.model.loading import NANO_DIR
from helpers.model.modeling import CharacterGLMConfig

SIX_B = CharacterGLMConfig()
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory_estimate.py"


@pytest.fixture(scope="module")
def benchmark():
    """benchmarks/memory_estimate.py as a module."""
    sys.path.append(str(BENCHMARK.parent))  # where it finds its `support`, as it does when it is run
    spec = importlib.util.spec_from_file_location("memory_estimate", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def empty_model(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_parameters_are_counted_as_the_model_counts_them():
    assert parameter_count(SIX_B) == 6_243_584_000
    for config in (SIX_B, AutoConfig.from_pretrained(NANO_DIR)):
        assert parameter_count(config) == empty_model(config).num_parameters()
    assert lora_count(SIX_B, 8) == 3_784_704


@pytest.mark.parametrize("quantization", QUANTIZED_BYTES)
def test_quantisation_leaves_embeddings_and_head_alone(quantization):
    model = empty_model(SIX_B)
    head = model.get_output_embeddings()
    linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    quantized = sum(weight.numel() for weight in linear)
    expected = quantized * QUANTIZED_BYTES[quantization] + 2 * (model.num_parameters() - quantized)
    assert weight_bytes(SIX_B, 2, quantization) == pytest.approx(expected, abs=1)


def test_a_gguf_file_in_llama_cpp():
    """Its weights are as large as the file; an adapter cannot be trained on it."""
    gigabytes = {kind: weight_bytes(SIX_B, 2, kind) / 1e9 for kind in GGUF_BYTES}
    assert gigabytes == pytest.approx({"f16": 12.49, "bf16": 12.49, "q8_0": 6.63, "q4_k_m": 4.08}, abs=0.01)
    four_bits = helpers.estimate("chat", quantization="q4_k_m", tokens=4096, gpu=8)
    assert four_bits.fits and not helpers.estimate("chat", quantization="f16", gpu=8).fits
    assert four_bits.parts["KV cache"] == 4096 * 28 * 1024
    with pytest.raises(HelpersError, match=r"\[invalid quantization\]"):
        helpers.estimate("lora", quantization="q4_k_m")


@pytest.mark.slow
def test_estimates_agree_with_measured_memory(run_command):
    done = run_command(str(BENCHMARK), "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" measured ") >= 3  # each case in three processes


@pytest.mark.slow
@pytest.mark.parametrize(("task", "options"), [("chat", {"tokens": 2048}), ("lora", {"batch": 4, "tokens": 512})])
def test_estimates_agree_with_every_tensor_of_the_6b(benchmark, task, options):
    expected = sum(helpers.estimate(task, "6b", **options).parts.values())
    assert expected == pytest.approx(benchmark.counted(task, options), rel=0.02)


def test_the_6b_fits_where_the_tutorial_says():
    assert helpers.estimate("chat", "6b", gpu=16).fits
    assert not helpers.estimate("chat", "6b", gpu=12).fits
    assert helpers.estimate("chat", "6b", quantization="nf4", gpu=8).fits
    lora = {"batch": 4, "tokens": 512, "gpu": 24}
    assert helpers.estimate("lora", "6b", **lora).fits
    assert not helpers.estimate("lora", "6b", **lora, dtype="float32").fits
    without = helpers.estimate("lora", "6b", **lora, checkpointing=False)
    assert without.gib > 1.5 * helpers.estimate("lora", "6b", **lora).gib


def test_a_download_is_told_in_time():
    found = helpers.estimate("download", "6b", mbit_per_second=100)
    assert found.seconds == pytest.approx(12.487e9 * 8 / 100e6, rel=1e-3)
    assert found.row() == {"下载": "11.63", "合计 GiB": "11.63", "时间": "17 分钟"}


def test_a_row_holds_parts_sum_and_verdict():
    found = helpers.estimate("chat", "nano", dtype="float32", gpu=24)
    assert list(found.row()) == ["权重", "KV cache", "LoRA", "优化器", "激活", "合计 GiB", "24 GiB 显存"]
    assert found.row()["LoRA"] == "-"
    assert found.row()["24 GiB 显存"] == "够"
    assert str(found).startswith("chat：权重 0.03")
    assert helpers.estimate("chat", "nano", gpu=0.5).row()["0.5 GiB 显存"] == "不够"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "dance"}, "invalid task"),
        ({"dtype": "int3"}, "invalid dtype"),
        ({"quantization": "int3"}, "invalid quantization"),
        ({"tokens": 0}, "invalid tokens"),
        ({"lora_rank": -1}, "invalid lora_rank"),
        ({"lora_targets": ["query_key_value"]}, "query_key_value.*invalid lora_targets"),
        ({"mbit_per_second": 0}, "invalid mbit_per_second"),
    ],
)
def test_nonsense_is_refused(arguments, message):
    with pytest.raises(HelpersError, match=message):
        helpers.estimate(**{"task": "chat"} | arguments)
