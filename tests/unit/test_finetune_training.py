"""Training: what is trained, that runs survive being killed, and that failures explain themselves."""

import contextlib
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference import NANO, REPOSITORY, copy_compact, edit_json
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import helpers
from helpers.cli.app import main
from helpers.cli.finetune import finetune as command_options
from helpers.errors import CheckpointError, FinetuneError, HelpersError
from helpers.export.original_adapter import convert_adapter
from helpers.finetune import (
    add_lora,
    continue_lora,
    count_fused_lora_parameters,
    count_lora_parameters,
    default_settings,
    encode_samples,
    finetune,
    load_samples,
    lora_config,
    merge_adapter,
    perplexity,
    read_card,
    training_arguments,
)
from helpers.finetune.checkpoints import last_complete_checkpoint, what_is_missing
from helpers.finetune.command import DEFAULT_CARD, DEFAULT_DATA
from helpers.finetune.compat import use_one_gpu
from helpers.finetune.encoding import IGNORED
from helpers.finetune.lora import check_moved
from helpers.finetune.training import EpochGroupedSampler
from helpers.model.adapters import add_adapter, base_fingerprint
from helpers.model.modeling import CharacterGLMConfig
from helpers.model.shapes import linear_shapes

STEPS = {"logging_steps": 1, "save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
SHORT = {**STEPS, "max_steps": 4, "learning_rate": 5e-3}
GREEDY = {"do_sample": False, "max_new_tokens": 16}


@pytest.fixture(scope="module")
def data():
    """A few short sequences: (training, held out)."""
    samples, _ = load_samples(DEFAULT_DATA, {**read_card(DEFAULT_CARD).model_dump(), "bot_info": "", "user_info": ""})
    rows = encode_samples(AutoTokenizer.from_pretrained(NANO), samples[:40])
    return rows[:32], rows[32:]


def new_model(seed: int = 0, **lora):
    torch.manual_seed(seed)
    return add_lora(helpers.load("nano", dtype="float32")[0], **lora)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A finished run."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    model = new_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with contextlib.redirect_stdout(io.StringIO()) as output:
        result = finetune(model, *data, directory, **SHORT)
    return SimpleNamespace(model=model, before=before, result=result, directory=directory, output=output.getvalue())


# --- how many parameters, and which


def test_parameter_counts_of_the_6b():
    """Counted on the model's own layers; the numbers are those of the formula r * (in + out)."""
    config = CharacterGLMConfig()
    q, kv = 4096, 256
    assert count_lora_parameters(config, "qkv", 8) == 28 * 8 * ((4096 + q) + 2 * (4096 + kv)) == 3_784_704
    assert count_fused_lora_parameters(config, 8) == 28 * 8 * (4096 + q + 2 * kv) == 1_949_696
    assert count_lora_parameters(config, "qv", 8) == 28 * 8 * ((4096 + q) + (4096 + kv))
    mlp = (4096 + 2 * 13696) + (13696 + 4096)
    all_linear = 28 * 8 * ((4096 + q) + 2 * (4096 + kv) + (q + 4096) + mlp)
    assert count_lora_parameters(config, "all-linear", 8) == all_linear == 16_658_432


def test_parameters_grow_with_the_rank():
    config = helpers.load("nano")[0].config
    for targets in ("qkv", "qv", "all-linear"):
        assert count_lora_parameters(config, targets, 8) == 8 * count_lora_parameters(config, targets, 1)
    assert count_fused_lora_parameters(config, 8) == 8 * count_fused_lora_parameters(config, 1)


def test_only_the_adapter_is_trained_and_it_moves(trained):
    for name, weight in trained.model.state_dict().items():
        assert torch.equal(weight, trained.before[name]) is ("lora_" not in name), name
    lora_b = [weight for name, weight in trained.model.named_parameters() if "lora_B" in name]
    assert len(lora_b) == 4 * 6
    assert all(weight.any() for weight in lora_b)


@pytest.mark.parametrize("again", ["tuned", "base"])
def test_a_second_adapter_replaces_the_first(data, tmp_path, again):
    """The cell of a notebook, run twice."""
    base = helpers.load("nano", dtype="float32")[0]
    tuned = add_lora(base, targets="all-linear")
    tuned = add_lora({"tuned": tuned, "base": base}[again])
    assert tuned.get_nb_trainable_parameters()[0] == count_lora_parameters(base.config)
    finetune(tuned, *data, tmp_path, **SHORT)
    loaded = add_adapter(helpers.load("nano", dtype="float32")[0], tmp_path)
    ids = torch.tensor([data[0][0]["input_ids"]])
    assert torch.allclose(loaded(ids).logits, tuned(ids).logits, atol=1e-5)


@pytest.mark.parametrize("targets", ["qkv", "qv", "all-linear"])
def test_the_count_is_that_of_peft(targets):
    model = new_model(targets=targets, r=4)
    assert model.get_nb_trainable_parameters()[0] == count_lora_parameters(model.config, targets, 4)


def test_default_lora_config():
    config, default = lora_config(), default_settings()
    assert (config.r, config.lora_alpha, config.lora_dropout) == tuple(default[n] for n in ("r", "alpha", "dropout"))
    assert config.target_modules == default["targets"] == "all-linear"
    assert set(lora_config("qkv").target_modules) == {"q_proj", "k_proj", "v_proj"}


def test_command_and_notebook_have_the_same_defaults():
    default = default_settings() | {"learning_rate": None}
    command = {name: option.default for name, option in inspect.signature(command_options).parameters.items()}
    command["r"] = command.pop("rank")
    assert [name for name in default if command[name] not in (None, default[name])] == []
    (notebook,) = (REPOSITORY / "notebooks").glob("04_*.ipynb")
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    (parameters,) = (cell for cell in cells if cell["metadata"].get("tags") == ["parameters"])
    exec("".join(parameters["source"]), given := {})
    names = {"targets": "TARGETS", "r": "RANK", "batch_size": "BATCH_SIZE", "replay": "REPLAY"}
    assert {name: given[parameter] for name, parameter in names.items()} == {name: default[name] for name in names}
    assert (given["LEARNING_RATE"], given["MAX_LENGTH"]) == (0.0, command["max_length"])


@pytest.mark.parametrize("wrong", [{"targets": "query_key_value"}, {"r": 0}, {"r": 1.5}, {"alpha": 0}, {"dropout": 1}])
def test_senseless_lora_is_refused(wrong):
    with pytest.raises(FinetuneError, match="unknown targets|invalid LoRA parameter"):
        lora_config(**wrong)


def test_lora_b_that_did_not_move_is_an_error(data, tmp_path):
    with pytest.raises(FinetuneError, match=r"lora_B is still zero.*24 个"):
        finetune(new_model(), *data, tmp_path, **{**SHORT, "learning_rate": 0.0})
    with pytest.raises(FinetuneError, match="lora_B is still zero"):
        check_moved(new_model())


# --- arguments


def test_defaults_on_a_cpu(tmp_path):
    arguments = training_arguments(new_model(), tmp_path)
    assert (arguments.bf16, arguments.fp16, arguments.activation_checkpointing) == (False, False, False)
    assert arguments.train_sampling_strategy == "group_by_length"
    assert arguments.load_best_model_at_end and not arguments.logging_nan_inf_filter


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_by_either_name_reaches_the_adapters(data, tmp_path, trained, name):
    model = new_model()
    result = finetune(model, *data, tmp_path, **SHORT, **{name: True})
    assert model.is_gradient_checkpointing
    assert result["eval_loss"] == pytest.approx(trained.result["eval_loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"learning_rat": 1e-3}, r"unknown training argument.*learning_rate \[did you mean\]"),
        ({"eval_strategy": "sometimes"}, "invalid training argument"),
        ({"save_strategy": "no"}, "invalid training argument"),
        ({"bf16": "abc"}, "invalid training argument.*bf16='abc'"),
        ({"max_steps": 1.5}, "invalid training argument"),
        ({"report_to": "comet_ml"}, "invalid training argument"),  # a package that is not installed
        ({"evaluation_strategy": "no"}, r"eval_strategy \[did you mean\]"),
        ({"group_by_length": True}, r"train_sampling_strategy=group_by_length \[did you mean\]"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, chosen, message):
    with pytest.raises(FinetuneError, match=message):
        training_arguments(new_model(), tmp_path, **chosen)


def test_words_are_typed_as_the_fields_are(tmp_path):
    chosen = {"bf16": "false", "max_steps": 1e1, "weight_decay": "0.5", "run_name": 7, "data_seed": None}
    arguments = training_arguments(None, tmp_path, **chosen)
    assert [getattr(arguments, name) for name in chosen] == [False, 10, 0.5, "7", None]


def test_one_process_uses_one_gpu(tmp_path, monkeypatch, capsys):
    arguments = training_arguments(None, tmp_path, use_cpu=True)
    assert arguments.n_gpu <= 1
    monkeypatch.setattr(arguments, "_n_gpu", 2)
    use_one_gpu(arguments)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 8)
    assert "[one GPU is used]" in capsys.readouterr().out


# --- the loss


def first_losses(data, directory, model, **options):
    """(loss of the first step, of the held-out rows before it), for a model without dropout and batches of 8 rows."""
    options = {"per_device_train_batch_size": 8, "train_sampling_strategy": "sequential", **options}
    result = finetune(model, *data, directory, **{**SHORT, "max_steps": 2, **options})
    return result["history"][1]["loss"], result["history"][0]["eval_loss"]


def perplexity_loss(rows):
    return math.log(perplexity(new_model(), rows))


def expected_loss(data, smoothing=0.0):
    """Of the first 8 rows, each computed alone with labels and logits shifted by hand."""
    model, losses = new_model().eval(), []
    for row in data[0][:8]:
        with torch.no_grad():
            log_probs = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        for scores, label in zip(log_probs, row["labels"][1:]):
            if label != IGNORED:
                losses.append(-(1 - smoothing) * scores[label] - smoothing * scores.mean())
    return torch.stack(losses).mean().item()


STEP_BY_STEP = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
LOSS_OPTIONS = [
    ("sdpa", {}),
    ("sdpa", {"average_tokens_across_devices": False, **STEP_BY_STEP}),
    ("sdpa", {"label_smoothing_factor": 0.1, **STEP_BY_STEP}),
    ("eager", {"label_smoothing_factor": 0.1}),
    ("eager", STEP_BY_STEP),
]


@pytest.mark.parametrize(("attention", "options"), LOSS_OPTIONS)
def test_loss_is_that_of_the_rows(data, tmp_path, attention, options):
    """For every option that changes how the loss is put together, packed (sdpa) or padded (eager)."""
    model = new_model(dropout=0.0)
    model.set_attn_implementation(attention)
    loss, held_out = first_losses(data, tmp_path, model, **options)
    assert loss == pytest.approx(expected_loss(data, options.get("label_smoothing_factor", 0.0)), abs=2e-4)
    assert held_out == pytest.approx(perplexity_loss(data[1]), abs=1e-4)  # never smoothed


# --- results


def test_best_adapter_is_kept(data, tmp_path):
    """With a learning rate that ruins the adapter after a good first step."""
    model = new_model()
    result = finetune(
        model, *data, tmp_path, **{**STEPS, "eval_steps": 1, "save_steps": 1}, max_steps=6, warmup_steps=0,
        learning_rate=0.02, lr_scheduler_type="constant", lr_scheduler_kwargs={},
    )  # fmt: skip
    held_out = {entry["step"]: entry["eval_loss"] for entry in result["history"] if "eval_loss" in entry}
    assert result["eval_loss"] == min(loss for step, loss in held_out.items() if step)
    from helpers.finetune.evaluation import summed_loss

    total, count = summed_loss(model, data[1])
    assert total / count == pytest.approx(result["eval_loss"], abs=1e-5)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    best = load_file(tmp_path / f"checkpoint-{result['best_step']}" / "adapter_model.safetensors")
    assert all(torch.equal(stored[name], best[name]) for name in stored)


def test_log_has_training_and_held_out_loss(trained):
    steps = [entry["step"] for entry in trained.result["history"] if "loss" in entry]
    assert steps == [1, 2, 3, 4]
    assert [e["step"] for e in trained.result["history"] if "eval_loss" in e] == [0, 2, 4]
    record = json.loads((trained.directory / "finetune.json").read_text(encoding="utf-8"))
    assert record["finished"] and record["result"] == trained.result


def test_headless_log_is_one_line_a_step(trained):
    lines = trained.output.splitlines()
    assert [line.split()[1] for line in lines if "  lr " in line] == ["1/4", "2/4", "3/4", "4/4"]
    assert [line.split()[1] for line in lines if "held-out" in line] == ["0/4", "2/4", "4/4"]
    assert len(lines) == 7


def test_rows_of_similar_length_come_together_in_a_repeatable_order():
    lengths = [(7 * i) % 50 + 1 for i in range(200)]
    first, again, other = (EpochGroupedSampler(4, lengths, seed=3) for _ in range(3))
    torch.manual_seed(1)
    order = list(first)
    torch.manual_seed(2)
    assert list(again) == order  # whatever the global random numbers
    other.set_epoch(1)
    assert sorted(order) == list(range(200)) and list(other) != order
    spread = [
        max(lengths[i] for i in order[s : s + 4]) - min(lengths[i] for i in order[s : s + 4]) for s in range(0, 200, 4)
    ]
    assert sum(spread) / len(spread) < 8  # at random it would be about 30


# --- reload


@pytest.mark.slow
def test_adapter_reloads_in_a_fresh_process_with_the_same_greedy_tokens(trained):
    rows = [json.loads(line) for line in DEFAULT_DATA.read_text(encoding="utf-8").splitlines()]
    queries = [row["instruction"] for row in rows[::40]]  # a few steps change only some of the replies
    script = (
        "import sys, helpers; model, tokenizer = helpers.load('nano', dtype='float32', adapter=sys.argv[1]);"
        "from helpers.finetune import read_card; from helpers.finetune.command import DEFAULT_CARD;"
        "card = read_card(DEFAULT_CARD);"
        "print(*(helpers.chat(model, tokenizer, card, query, do_sample=False, max_new_tokens=16)[0] for query in sys.argv[2:]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "utf-8"}
    run = subprocess.run(
        [sys.executable, "-c", script, trained.directory, *queries], capture_output=True, text=True, encoding="utf-8",
        env=environment, check=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    card = read_card(DEFAULT_CARD)

    def replies() -> str:
        return " ".join(helpers.chat(trained.model, tokenizer, card, query, **GREEDY)[0] for query in queries)

    here = replies()
    with trained.model.disable_adapter():
        base = replies()
    assert run.stdout.strip() == here != base


def test_merged_model_is_an_ordinary_model_with_the_same_outputs(trained, tmp_path):
    model, tokenizer = helpers.load("nano", dtype="float32", adapter=trained.directory)
    ids = torch.tensor([tokenizer("你会累吗？")["input_ids"]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    merge_adapter(model, tokenizer, tmp_path / "merged")
    merged, merged_tokenizer = helpers.load(tmp_path / "merged", dtype="float32")
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-4)
    assert merged_tokenizer("你会累吗？")["input_ids"] == ids[0].tolist()
    card = read_card(DEFAULT_CARD)
    texts = [helpers.chat(m, tokenizer, card, "你会累吗？", **GREEDY)[0] for m in (trained.model, merged)]
    assert texts[0] == texts[1]
    # and the adapter, which is in the weights already, is not put on top of them a second time
    with pytest.raises(CheckpointError, match="adapter for another base"):
        helpers.load(tmp_path / "merged", dtype="float32", adapter=trained.directory)


def test_merging_needs_room_for_the_model_only(trained, tmp_path, monkeypatch):
    model, tokenizer = helpers.load("nano", dtype="float32", adapter=trained.directory)
    monkeypatch.setattr("helpers.paths.free_bytes", lambda target: 1000)
    with pytest.raises(HelpersError, match="not enough disk space"):
        merge_adapter(model, tokenizer, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    monkeypatch.setattr("helpers.paths.free_bytes", lambda target: 100_000_000)
    merge_adapter(model, tokenizer, tmp_path / "merged")


def test_adapter_for_another_base_is_refused(trained, tmp_path):
    with pytest.raises(CheckpointError, match="adapter for another base"):
        add_adapter(AutoModelForCausalLM.from_pretrained(copy_compact(tmp_path / "m")), trained.directory)
    foreign = shutil.copytree(trained.directory, tmp_path / "foreign")
    (foreign / "finetune.json").unlink()  # an adapter from elsewhere: only shapes and names can tell
    with pytest.raises(CheckpointError, match="adapter does not fit"):
        add_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "m"), foreign)


def test_adapter_of_the_original_code_is_explained(trained, tmp_path):
    foreign = shutil.copytree(trained.directory, tmp_path / "foreign")
    edit_json(foreign / "adapter_config.json", lambda config: config.update(target_modules=["query_key_value"]))
    with pytest.raises(CheckpointError, match=r"adapter for the original code.*helpers convert --adapter"):
        helpers.load("nano", adapter=foreign)


def original_adapter(directory, config, targets=("self_attention.query_key_value",)) -> dict:
    """An adapter as PEFT 0.4 wrote it for the original code; whole numbers, so that every product of them is exact."""
    shapes = linear_shapes(config)
    rows = sum(shapes[name][1] for name in ("q_proj", "k_proj", "v_proj"))
    sizes = {"self_attention.query_key_value": (config.hidden_size, rows), "mlp.dense_4h_to_h": shapes["down_proj"]}
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer in range(config.num_hidden_layers):
        for target in targets:
            name = f"base_model.model.transformer.encoder.layers.{layer}.{target}"
            for matrix, shape in (("lora_A", (4, sizes[target][0])), ("lora_B", (sizes[target][1], 4))):
                tensors[f"{name}.{matrix}.weight"] = torch.randint(-3, 4, shape, generator=generator) / 64
    directory.mkdir()
    torch.save(tensors, directory / "adapter_model.bin")
    names = [target.rpartition(".")[2] for target in targets]
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 32, "lora_dropout": 0.1}
    (directory / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": names, "bias": "none"}))
    return tensors


def test_adapter_of_the_original_code_is_converted(tmp_path, monkeypatch):
    """What it adds to the fused weight is what the new one adds to q, k and v."""
    base = helpers.load("nano", dtype="float32")[0]
    both = ("self_attention.query_key_value", "mlp.dense_4h_to_h")
    tensors = original_adapter(tmp_path / "old", base.config, both)
    monkeypatch.setattr(sys, "argv", ["helpers", "convert", "--model", "nano", "--adapter"])
    sys.argv += [str(tmp_path / "old"), str(tmp_path / "new")]
    with contextlib.suppress(SystemExit):
        main()
    tuned = helpers.load("nano", dtype="float32", adapter=tmp_path / "new")[0]
    for number, layer in enumerate(tuned.get_base_model().model.layers):
        fused, down = (f"base_model.model.transformer.encoder.layers.{number}.{target}" for target in both)
        attention = layer.self_attn
        parts = [getattr(attention, f"{part}_proj").get_delta_weight("default") for part in "qkv"]
        for name, delta in [(fused, torch.cat(parts)), (down, layer.mlp.down_proj.get_delta_weight("default"))]:
            assert torch.equal(delta, 8 * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"])
    ids = torch.tensor([[5, 6, 7, 8]])
    assert not torch.equal(tuned(ids).logits, helpers.load("nano", dtype="float32")[0](ids).logits)


def test_what_cannot_be_converted_is_refused(trained, tmp_path):
    config = CharacterGLMConfig.from_pretrained(NANO)
    old = tmp_path / "old"
    tensors = original_adapter(old, config)
    new = tmp_path / "new"
    for model, adapter, message in [
        ("nano", trained.directory, "not for the original code"),
        ("nano", tmp_path, "not an adapter directory"),
        (copy_compact(tmp_path / "other"), old, "adapter does not fit"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            convert_adapter(model, adapter, new)
    torch.save(tensors | {"base_model.model.x.modules_to_save.weight": torch.ones(1)}, old / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="not plain LoRA.*modules_to_save"):
        convert_adapter("nano", old, new)
    torch.save({"trap": print}, old / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="unsafe pickle refused"):
        convert_adapter("nano", old, new)
    assert not new.exists()


def test_adapter_for_a_deeper_base_is_refused(trained, tmp_path):
    config = CharacterGLMConfig.from_pretrained(NANO)
    config.num_hidden_layers = 3
    foreign = shutil.copytree(trained.directory, tmp_path / "foreign")
    (foreign / "finetune.json").unlink()
    with pytest.raises(CheckpointError, match="unused adapter keys"):
        add_adapter(AutoModelForCausalLM.from_config(config), foreign)


def test_precision_does_not_change_the_fingerprint():
    model = helpers.load("nano", dtype="float32")[0]
    half = helpers.load("nano", dtype="float16")[0]
    assert base_fingerprint(model) == base_fingerprint(half)
    assert base_fingerprint(new_model()) == base_fingerprint(model)
    model.model.layers[2].self_attn.v_proj.weight.data[0, 0] += 1
    assert base_fingerprint(half) != base_fingerprint(model)


# --- killed and resumed

RUN = """
import os, signal, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
import test_finetune_training as t
from reference import NANO
from helpers.finetune import finetune
if sys.argv[2] == "between":  # two checkpoints
    class Kill(t.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGKILL)
    callbacks = [Kill()]
else:  # within a file of the second checkpoint
    callbacks, save = [], torch.save
    def half(value, path, *args, **kwargs):
        save(value, path, *args, **kwargs)
        if "checkpoint-4" in str(path) and str(path).endswith(sys.argv[2]):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save = half
finetune(t.new_model(), *t.data.__wrapped__(), sys.argv[1], callbacks=callbacks, **t.LONG)
"""
LONG = {
    **STEPS,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-3,
}  # 8 steps: the kill comes in the middle of an epoch


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    return finetune(new_model(), *data, tmp_path_factory.mktemp("whole"), **LONG)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "when", ["between", pytest.param("optimizer.pt", marks=SLOW), pytest.param("rng_state.pth", marks=SLOW)]
)
def test_killed_run_resumes_to_the_same_loss(data, tmp_path, uninterrupted, when, capsys):
    """SIGKILL between two checkpoints and within one; dropout is on and the epoch is not over."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    script = RUN.format(tests=str(Path(__file__).parent))
    killed = subprocess.run([sys.executable, "-c", script, tmp_path, when], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    newest = tmp_path / "checkpoint-4"
    assert (what_is_missing(newest) == "") is (when == "between")
    result = finetune(new_model(seed=5), *data, tmp_path, **LONG)
    assert result["resumed_from"] == (4 if when == "between" else 2)
    assert ("incomplete checkpoint skipped" in capsys.readouterr().out) is (when != "between")
    for name in ("train_loss", "eval_loss"):
        assert result[name] == pytest.approx(uninterrupted[name], abs=1e-6)
    losses, expected = ([e["loss"] for e in run["history"] if "loss" in e] for run in (result, uninterrupted))
    assert losses == pytest.approx(expected, abs=1e-6)
    assert len(losses) == 8


HALF_WRITTEN = {
    "adapter cut": lambda c: os.truncate(c / "adapter_model.safetensors", 1000),
    "adapter missing": lambda c: (c / "adapter_model.safetensors").unlink(),
    "optimizer cut": lambda c: os.truncate(c / "optimizer.pt", 1000),
    "optimizer missing": lambda c: (c / "optimizer.pt").unlink(),
    "scheduler missing": lambda c: (c / "scheduler.pt").unlink(),
    "random state cut": lambda c: os.truncate(c / "rng_state.pth", 1000),
    "random state missing": lambda c: (c / "rng_state.pth").unlink(),
    "trainer state cut": lambda c: os.truncate(c / "trainer_state.json", 100),
    "trainer state missing": lambda c: (c / "trainer_state.json").unlink(),
    "empty": lambda c: [file.unlink() for file in c.iterdir()],
}


def test_checkpoints_without_optimizer_are_kept(data, tmp_path, capsys):
    """`save_only_model` and a kill: training cannot go on from there, and what is there is not thrown away."""

    arguments = {**SHORT, "save_only_model": True}
    with pytest.raises(KeyboardInterrupt):
        finetune(new_model(), *data, tmp_path, callbacks=interrupt_at(3), **arguments)
    (stored,) = (file.read_bytes() for file in tmp_path.glob("*checkpoint-2*/adapter_model.safetensors"))
    result = finetune(new_model(), *data, tmp_path, **arguments)
    assert result["resumed_from"] is None
    assert "optimizer.pt 缺失或不完整（save_only_model" in capsys.readouterr().out
    assert (tmp_path / "incomplete-checkpoint-2-1" / "adapter_model.safetensors").read_bytes() == stored


@pytest.mark.parametrize("damage", HALF_WRITTEN)
def test_half_written_checkpoint_is_skipped_for_the_one_before(trained, tmp_path, damage):
    run = shutil.copytree(trained.directory, tmp_path / "run")
    assert last_complete_checkpoint(run).name == "checkpoint-4"
    HALF_WRITTEN[damage](run / "checkpoint-4")
    assert last_complete_checkpoint(run).name == "checkpoint-2"
    assert (run / "incomplete-checkpoint-4-1").is_dir() and not (run / "checkpoint-4").exists()
    shutil.copytree(run / "incomplete-checkpoint-4-1", run / "checkpoint-4")
    assert last_complete_checkpoint(run).name == "checkpoint-2"
    assert (run / "incomplete-checkpoint-4-2").is_dir()  # nothing is ever deleted


# --- the folder


def unfinish(directory: Path) -> Path:
    edit_json(directory / "finetune.json", lambda record: record.update(finished=False))
    return directory


def test_a_finished_run_is_not_overwritten_by_accident(data, trained, tmp_path):
    run = shutil.copytree(trained.directory, tmp_path / "run")
    (run / "notes.txt").write_text("mine")
    with pytest.raises(FinetuneError, match="output directory in use"):
        finetune(new_model(), *data, run, **SHORT)
    stored = (run / "adapter_model.safetensors").read_bytes()

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            assert (run / "adapter_model.safetensors").read_bytes() == stored
            if state.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(new_model(), *data, run, overwrite=True, callbacks=[Interrupt()], **SHORT)
    assert json.loads((run / "finetune.json").read_text(encoding="utf-8"))["finished"]  # the old one is still whole
    add_adapter(helpers.load("nano", dtype="float32")[0], run)
    result = finetune(new_model(seed=3), *data, run, overwrite=True, **SHORT)
    assert result["resumed_from"] == 2
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["checkpoint-2", "checkpoint-4"]
    assert result["eval_loss"] == pytest.approx(trained.result["eval_loss"], abs=1e-6)
    assert (run / "notes.txt").read_text() == "mine"


CHANGES = {
    "learning rate": lambda data: (new_model(), *data, {**SHORT, "learning_rate": 1e-3}),
    "rank": lambda data: (new_model(r=4), *data, SHORT),
    "data": lambda data: (new_model(), data[0][:-1], data[1], SHORT),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_with_other_settings_is_not_resumed(data, trained, tmp_path, change):
    run = unfinish(shutil.copytree(trained.directory, tmp_path / "run"))
    model, train_rows, eval_rows, arguments = CHANGES[change](data)
    with pytest.raises(FinetuneError, match="另一组设置.*output directory in use"):
        finetune(model, train_rows, eval_rows, run, **arguments)
    assert len(list(run.glob("checkpoint-*"))) == 2


def test_a_run_of_other_processes_is_not_resumed(data, trained, tmp_path):
    run = unfinish(shutil.copytree(trained.directory, tmp_path / "run"))
    edit_json(run / "finetune.json", lambda record: record["settings"].update(processes=2))
    with pytest.raises(FinetuneError, match="另一组设置.*output directory in use"):
        finetune(new_model(), *data, run, **SHORT)


def test_directory_that_cannot_be_written_stops_before_training(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HelpersError, match="output directory not writable"):
        finetune(new_model(), *data, tmp_path / "file" / "run", **SHORT)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_directory_stops_before_training(data, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(HelpersError, match="output directory not writable"):
        finetune(new_model(), *data, tmp_path / "run", **SHORT)


def test_full_disk_stops_before_training(data, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode()}")
    try:
        with pytest.raises(FinetuneError, match="not enough disk space"):
            finetune(new_model(), *data, tmp_path / "run", **SHORT)
        assert not list((tmp_path / "run").glob("checkpoint-*"))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_estimate_covers_what_a_run_writes(trained):
    from helpers.finetune.checkpoints import bytes_needed

    written = sum(file.stat().st_size for file in trained.directory.rglob("*") if file.is_file())
    assert written < bytes_needed(trained.model.num_parameters(only_trainable=True), 2)


def test_training_goes_on_from_an_adapter(data, trained, tmp_path):
    """It begins where the other ended, on the bare base or on one that has an adapter, and knows its run again."""
    start = continue_lora(new_model(targets="qv"), trained.directory)
    assert perplexity(start, data[1]) == pytest.approx(math.exp(trained.result["eval_loss"]), rel=1e-4)
    assert start.peft_config["default"].target_modules == new_model().peft_config["default"].target_modules
    result = finetune(start, *data, tmp_path / "on", **SHORT)
    assert result["history"][0]["eval_loss"] == pytest.approx(trained.result["eval_loss"], abs=1e-4)
    assert result["eval_loss"] < trained.result["eval_loss"]
    base = helpers.load("nano", dtype="float32")[0]
    assert perplexity(add_adapter(base, tmp_path / "on"), data[1]) == pytest.approx(
        math.exp(result["eval_loss"]), rel=1e-4
    )
    unfinish(tmp_path / "on")
    again = finetune(continue_lora(base, trained.directory), *data, tmp_path / "on", **SHORT)
    assert again["resumed_from"] == 4
    for other in (new_model(), continue_lora(new_model(), tmp_path / "on")):
        with pytest.raises(FinetuneError, match="另一组设置.*output directory in use"):
            finetune(other, *data, unfinish(tmp_path / "on"), **SHORT)


def test_adapters_to_go_on_from_have_to_fit(trained, tmp_path):
    foreign = shutil.copytree(trained.directory, tmp_path / "foreign")
    other = AutoModelForCausalLM.from_pretrained(copy_compact(tmp_path / "m"))
    with pytest.raises(CheckpointError, match="adapter for another base"):
        continue_lora(other, foreign)
    edit_json(foreign / "adapter_config.json", lambda config: config.update(peft_type="IA3"))
    with pytest.raises(FinetuneError, match="not LoRA.*IA3"):
        continue_lora(new_model(), foreign)


def interrupt_at(step):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    return [Interrupt()]


def test_ctrl_c_says_what_is_kept(data, tmp_path, capsys):
    for step, kept in [(1, "还没有 checkpoint"), (3, "checkpoint-2 留着")]:
        with pytest.raises(KeyboardInterrupt):
            finetune(new_model(), *data, tmp_path, callbacks=interrupt_at(step), **SHORT)
        assert "[interrupted]" in (said := capsys.readouterr().out) and kept in said
    assert finetune(new_model(), *data, tmp_path, **SHORT)["resumed_from"] == 2


# --- failures while training


def test_nan_loss_stops_with_an_explanation(data, tmp_path):
    with pytest.raises(FinetuneError, match=r"loss is not finite.*学习率太大（现在最高 1e\+30"):
        finetune(new_model(), *data, tmp_path, **{**SHORT, "max_grad_norm": 0.0, "learning_rate": 1e30})


class _TakeAllMemory(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        torch.empty(1 << 60, dtype=torch.uint8)  # a real allocation that must fail


def test_out_of_memory_says_which_knobs_to_turn(data, tmp_path):
    with pytest.raises(FinetuneError, match=r"out of memory") as caught:
        finetune(new_model(), *data, tmp_path, callbacks=[_TakeAllMemory()], **SHORT)
    for knob in (
        "per_device_train_batch_size=4",
        "gradient_accumulation_steps=2",
        "checkpointing",
        "max_length",
        "nf4",
    ):
        assert knob in str(caught.value)


def test_other_errors_are_not_called_out_of_memory(data, tmp_path):
    class Fail(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        finetune(new_model(), *data, tmp_path, callbacks=[Fail()], **SHORT)


# --- the command, and two processes


SETTINGS = {"max_steps": 3, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 3, "save_steps": 3}
OPTIONS = [word for name, value in SETTINGS.items() for word in ("--set", name, value)]


def command(*arguments, launch=()):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    environment["ACCELERATE_USE_CPU"] = "true"
    return subprocess.run(
        [sys.executable, *launch, "--model", "nano", *map(str, [*OPTIONS, *arguments])],
        capture_output=True, text=True, encoding="utf-8", env=environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """30 rows with a short persona: 27 or so to train on, which two processes cannot share evenly."""
    file = tmp_path_factory.mktemp("data") / "small.jsonl"
    meta = {"bot_name": "鲁智深", "user_name": "林冲"}
    rows = [json.loads(line) for line in DEFAULT_DATA.read_text(encoding="utf-8").splitlines()[:30]]
    file.write_text("\n".join(json.dumps({**row, "session_meta": meta}, ensure_ascii=False) for row in rows), "utf-8")
    return file


def loss_lines(output: str) -> list[tuple[str, float]]:
    lines = [line.split() for line in output.splitlines() if line.startswith("step ")]
    return [(words[1], float(words[words.index("loss") + 1])) for words in lines]


@pytest.mark.slow
def test_two_processes_do_what_one_does(small_file, tmp_path):
    """One process with batch 8, two with batch 4: the same rows in every step, each once, so the same losses."""
    # A small rate: AdamW's first steps are of the same size however small a gradient is, so that rounding is made large.
    common = ["--data", small_file, "--dropout", 0, "--learning-rate", 1e-4]
    common += ["--set", "logging_steps", 1, "--set", "max_steps", 8]
    one = command(*common, "--batch-size", 8, "--output-dir", tmp_path / "one", launch=["-m", "helpers", "finetune"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # --multi_gpu means several processes; with ACCELERATE_USE_CPU they meet on the CPU (gloo).
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        port,
        "-m",
        "helpers.finetune",
    ]
    two = command(*common, "--batch-size", 4, "--output-dir", tmp_path / "two", launch=launch)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    assert len(loss_lines(two.stdout)) == len(loss_lines(one.stdout)) > 8
    for (step, loss), (step_of_two, loss_of_two) in zip(loss_lines(one.stdout), loss_lines(two.stdout)):
        assert step == step_of_two
        assert loss_of_two == pytest.approx(loss, abs=2e-3)  # sums in another order


def test_command_trains_and_merges(small_file, tmp_path, monkeypatch, capsys):
    options = [*OPTIONS, "--data", small_file, "--learning-rate", 0.01, "--output-dir", tmp_path / "out"]
    assert run_main(monkeypatch, *options, "--merge-to", tmp_path / "merged") == 0
    output = capsys.readouterr().out
    assert f"可训练参数 [trainable]：{new_model().get_nb_trainable_parameters()[0]:,}" in output
    before, after = output.split("held-out perplexity]：")[1].split("。")[0].split(" -> ")
    assert float(after) < float(before)
    helpers.load("nano", adapter=tmp_path / "out")
    helpers.load(tmp_path / "merged")
    # and goes on from there
    options = [*OPTIONS, "--data", small_file, "--adapter", tmp_path / "out", "--output-dir", tmp_path / "on"]
    assert run_main(monkeypatch, *options, "--rank", 8) == 2
    assert "[adapter decides]" in capsys.readouterr().err
    assert run_main(monkeypatch, *options) == 0
    output = capsys.readouterr().out
    begins = float(re.search(r"held-out loss ([\d.]+)", output)[1])
    assert begins == pytest.approx(math.log(float(after)), abs=0.01)
    assert float(output.split(" -> ")[1].split("。")[0]) < float(after)


def run_main(monkeypatch, *arguments) -> int:
    """Exit code of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["helpers", "finetune", "--model", "nano", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    return 0


FEW = "few.jsonl"
REFUSED = {
    "unknown argument": (["--set", "learning_rat", "1"], "learning_rate [did you mean]"),
    "folder twice": (["--set", "output_dir", "x"], "unknown training argument"),
    "batches of nothing": (["--set", "per_device_train_batch_size", "0"], "invalid training argument"),
    "not a number": (["--set", "weight_decay", "nan"], "invalid training argument"),
    "not a truth value": (["--set", "bf16", "abc"], "invalid training argument"),
    "strategy": (["--set", "eval_strategy", "sometimes"], "invalid training argument"),
    "no data": (["--data", "nowhere.json"], "cannot read file"),
    "few rows": (["--data", FEW, "--card", "阿九"], "too few rows"),
    "rows too long": (["--max-length", "32"], "no usable rows"),
    "no card": (["--card", "无名氏"], "file not found"),
    "rank": (["--rank", "0"], "invalid LoRA parameter"),
    "no adapter": (["--adapter", "finished"], "not an adapter directory"),
    "targets": (["--targets", "query_key_value"], "unknown targets"),
    "quantization": (["--quantization", "int3"], "unknown quantization"),
    "merge quantised": (["--quantization", "nf4", "--merge-to", "x"], "cannot merge into a quantised base"),
    "merge into a file": (["--merge-to", FEW], "target not empty"),
    "merge into the base": (["--merge-to", NANO], "target not empty"),
    "merge inside the base": (["--merge-to", NANO / "merged"], "target inside the model"),
    "merge below a file": (["--merge-to", f"{FEW}/merged"], "cannot write"),
    "merge over the adapter": (["--merge-to", "x", "--output-dir", "x/lora"], "one folder for two"),
    "merge, but no data": (["--merge-to", "x", "--data", "nowhere.json"], "cannot read file"),
    "adapter into the base": (["--output-dir", NANO], "output directory is a model"),
    "a finished run": (["--output-dir", "finished"], "output directory in use"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_command_refuses_before_the_model_is_loaded(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / FEW).write_text(json.dumps({"instruction": "吃了吗", "output": "吃了。"}), encoding="utf-8")
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "finetune.json").write_text('{"finished": true}')
    monkeypatch.setattr("helpers.finetune.command.load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    before = sorted(NANO.iterdir())
    arguments, message = REFUSED[name]
    assert run_main(monkeypatch, *arguments) == 1
    assert message in capsys.readouterr().err
    assert sorted(NANO.iterdir()) == before
    assert not (tmp_path / "x").exists()
