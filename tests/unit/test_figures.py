"""The GPU tier's code on a CPU: the checkpoint of the 6B's shape, and the benchmark that records the figures."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from original_layout import INDEX, SHARDS
from write_6b_shape import original_shapes, split, write_random_checkpoint

import helpers
from helpers.errors import HelpersError
from helpers.model.modeling import CharacterGLMConfig

SMALL = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A checkpoint of a small shape, written as the 6B's is."""
    directory = tmp_path_factory.mktemp("models") / "small-shape"
    write_random_checkpoint(directory, CharacterGLMConfig(**SMALL), dtype=torch.float32)
    return directory


def test_shape_of_the_6b_has_the_original_keys_sizes_and_shards():
    shapes = original_shapes(CharacterGLMConfig())
    assert len(shapes) == 200
    assert list(shapes)[:2] == ["transformer.embedding.word_embeddings.weight", "transformer.rotary_pos_emb.inv_freq"]
    assert list(shapes)[-1] == "transformer.output_layer.weight"
    layer = {re.sub(r"layers\.\d+", "layers.N", name): shape for name, shape in shapes.items() if ".layers." in name}
    assert {name.split("layers.N.")[1]: shape for name, shape in layer.items()} == {
        "input_layernorm.weight": (4096,),
        "self_attention.query_key_value.weight": (4608, 4096),
        "self_attention.query_key_value.bias": (4608,),
        "self_attention.dense.weight": (4096, 4096),
        "post_attention_layernorm.weight": (4096,),
        "mlp.dense_h_to_4h.weight": (27392, 4096),
        "mlp.dense_4h_to_h.weight": (4096, 13696),
    }
    assert sum(map(math.prod, shapes.values())) == 6_243_584_000 + 32
    first, second = (2 * sum(map(math.prod, shard.values())) for _, shard in split(shapes, torch.bfloat16))
    assert (first, second) == (pytest.approx(9.99e9, rel=0.03), pytest.approx(2.5e9, rel=0.1))


def test_checkpoint_loads_with_the_weights_that_are_in_its_files(small):
    assert {file.name for file in small.iterdir()} >= {*SHARDS, INDEX, "config.json", "tokenizer.model"}
    stored = {}
    for shard in SHARDS:
        stored |= torch.load(small / shard, weights_only=True)
    assert stored.keys() == json.loads((small / INDEX).read_text())["weight_map"].keys()
    model, tokenizer = helpers.load(small)
    assert torch.equal(model.lm_head.weight, stored["transformer.output_layer.weight"])
    assert stored["transformer.output_layer.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert stored["transformer.encoder.final_layernorm.weight"].mean() == pytest.approx(1, abs=0.02)
    bias = stored["transformer.encoder.layers.0.self_attention.query_key_value.bias"]
    assert bias.std() > 0.01, "zero biases would exercise nothing"
    assert len(tokenizer) <= model.config.vocab_size
    assert torch.isfinite(model(torch.arange(300, 310)[None]).logits).all()


def test_same_seed_same_bytes(small, tmp_path):
    write_random_checkpoint(tmp_path, CharacterGLMConfig(**SMALL), dtype=torch.float32)
    for shard in SHARDS:
        assert (tmp_path / shard).read_bytes() == (small / shard).read_bytes()


def test_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.paths.free_bytes", lambda _: 10**9)
    with pytest.raises(HelpersError, match="not enough disk space"):
        write_random_checkpoint(tmp_path, CharacterGLMConfig())
    assert list(tmp_path.iterdir()) == []


MEMORY_SCRIPT = """
import sys
from pathlib import Path

import torch
import write_6b_shape


def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


used = []
fill = write_6b_shape.fill
write_6b_shape.fill = lambda *arguments: (fill(*arguments), used.append(anonymous()))
shapes = {f"w{number}": (4096, 4096) for number in range(8)}
write_6b_shape.write_shard(Path(sys.argv[1]), shapes, torch.bfloat16)
print(max(used) - used[0])
"""


@pytest.mark.slow
def test_memory_stays_far_below_the_size_of_a_shard(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path / SHARDS[0])],
        env={"PYTHONPATH": f"{PROJECT}:{PROJECT}/scripts", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / SHARDS[0]).stat().st_size > 268e6
    assert int(done.stdout) < 64e6


@pytest.mark.slow
def test_figures_are_measured_and_recorded_on_any_device(small, run_command, tmp_path):
    options = {"--prompt-tokens": 64, "--new-tokens": 16, "--batch": 2, "--row-tokens": 32, "--steps": 3}
    words = [str(word) for pair in options.items() for word in pair]
    benchmark = str(PROJECT / "benchmarks" / "figures.py")
    done = run_command(benchmark, "--model", str(small), "--output-dir", str(tmp_path / "results"), *words)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "results").iterdir()
    report = json.loads(file.read_text(encoding="utf-8"))
    assert re.fullmatch(r"[a-z0-9-]+\.json", file.name)
    assert report["model"]["name"] == "small-shape"
    assert report["model"]["parameters"] == helpers.load(small)[0].num_parameters()
    assert report["load"]["seconds"] > 0
    assert 0 < report["chat"]["first_token_seconds"] < 5
    assert report["chat"]["tokens_per_second"] > 1
    assert report["lora"]["samples_per_second"] > 0.1
    assert report["lora"]["loss"] == pytest.approx(math.log(4096), rel=0.1), "random weights know nothing"
    assert report["lora"]["trained_parameters"] == 3 * 8 * ((64 + 64) + 2 * (64 + 32))
    for task in ("chat", "lora"):
        assert report[task]["peak_bytes"] > report[task]["estimated_bytes"] > 0
