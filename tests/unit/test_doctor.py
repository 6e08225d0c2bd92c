"""The doctor: each check on a machine where it holds and on one where it does not, and the errors it explains."""

import ast
import json
import re
import shutil
import socket
import sys
from collections import namedtuple

import pytest
import torch
from reference import shared
from typer.testing import CliRunner

import helpers
from helpers.cli.app import app
from helpers.errors import CheckpointError, HelpersError
from helpers.inspect.preflight import check_disk, check_model_files
from helpers.model.download import bytes_needed, default_model_dir
from helpers.paths import check_disk_space
from helpers.tools import doctor
from helpers.tools.faults import KNOWN_ERRORS, explain, own_messages

DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """No model downloaded, nothing in Jupyter's user folder, an empty working directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.chdir(tmp_path)


# --- checks


def test_short_form_is_what_notebooks_show_and_the_long_form_adds_to_it():
    short, long = doctor.preflight("nano"), doctor.examine("nano")
    assert [check.name for check in short] == ["Python", "torch", "transformers", "设备", "模型文件"]
    assert list(long[: len(short)]) == list(short)
    assert {"依赖库", "CUDA 与驱动", "磁盘", "端口 6006", "JupyterLab kernel"} <= {check.name for check in long}
    assert all(check.ok for check in short)


def test_libraries_outside_the_tested_range_are_named(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text("# comment\ntransformers>=5  # fine\npandas>=99\nno-such-library>=1\n")
    found = doctor.check_libraries(file)
    assert re.search(r"pandas [\d.]+ 不在 >=99；没有 no-such-library", found.found)
    assert "make setup" in found.advice
    file.write_text("transformers>=5\n")
    assert doctor.check_libraries(file).ok


@pytest.mark.parametrize(
    ("built_for", "driver", "advice"),
    [
        (None, None, ""),
        (None, "12.4", "CPU 版 torch"),
        ("13.0", "12.4", "torch 比驱动新"),
        ("12.4", "13.0", "无卡模式"),
        ("12.10", "12.9", "torch 比驱动新"),
    ],
)
def test_cuda_against_the_driver(tmp_path, monkeypatch, built_for, driver, advice):
    if torch.cuda.is_available():
        pytest.skip("a GPU is at hand, and works: these are the machines where it does not")
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setenv("PATH", str(tmp_path))
    if driver:
        smi = tmp_path / "nvidia-smi"
        smi.write_text(f"#!/bin/sh\necho '| NVIDIA-SMI 570.1  Driver Version: 570.1   CUDA Version: {driver}  |'\n")
        smi.chmod(0o755)
    found = doctor.check_driver()
    assert (driver or "没有 NVIDIA 驱动") in found.found
    assert advice in found.advice
    assert found.ok == (not advice)


@pytest.mark.parametrize(("gib", "enough"), [(0, True), (24, True), (12, False)])
def test_gpu_memory_for_each_notebook(monkeypatch, gib, enough):
    monkeypatch.setattr(doctor, "gpu_gib", lambda: float(gib))
    chat, lora = doctor.check_gpu_memory()
    assert "chat" not in chat.found and "GiB" in chat.found
    assert lora.name == "6b 显存 04 LoRA"
    assert lora.ok == enough


def test_disk_bound_is_that_of_the_download(monkeypatch):
    needed = bytes_needed(default_model_dir())
    for free in (needed - 1, needed):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: DiskUsage(2 * free, free, free))
        enough = True
        try:
            check_disk_space(default_model_dir(), needed)
        except HelpersError:
            enough = False
        assert check_disk().ok == enough == (free == needed)


def test_who_holds_the_port_is_said():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        found = doctor.check_port(port)
        assert not found.ok
        assert f"（进程 {doctor.psutil.Process().pid}）" in found.found
    assert doctor.check_port(port).ok


def test_a_kernel_must_run_this_python(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", "")
    monkeypatch.setattr("jupyter_core.paths.ENV_JUPYTER_PATH", [])
    monkeypatch.setattr("jupyter_core.paths.SYSTEM_JUPYTER_PATH", [])
    monkeypatch.setattr("jupyter_client.kernelspec.KernelSpecManager.ensure_native_kernel", False)
    put_kernel(tmp_path, "other", "/opt/conda/bin/python")
    found = doctor.check_kernel()
    assert "other" in found.found and "make kernel" in found.advice
    put_kernel(tmp_path, "characterglm", sys.executable)
    assert doctor.check_kernel().found.startswith("characterglm ")
    assert doctor.check_kernel().ok


def put_kernel(tmp_path, name, python):
    folder = tmp_path / "jupyter" / "kernels" / name
    folder.mkdir(parents=True)
    spec = {"argv": [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": name}
    (folder / "kernel.json").write_text(json.dumps(spec | {"language": "python"}))


def test_missing_model_says_what_to_type(monkeypatch):
    assert "python -m helpers download" in check_model_files("6b").advice
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(1, 1, 0))
    assert "清理数据盘" in check_model_files("6b").advice


def test_command_prints_every_word_and_its_exit_status_tells(run_command, tmp_path):
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(app, ["doctor", "--model", "empty"])
    assert done.exit_code == 1
    assert "[empty directory]" in re.sub(r"[│\s]+", " ", done.stdout), "not taken for markup"
    done = run_command("-m", "helpers", "doctor", "--json", "--model", "nano")
    checks = json.loads(done.stdout)
    assert checks[0] == {"name": "Python", "found": sys.version.split()[0], "ok": True, "advice": ""}
    assert done.returncode == int(not all(check["ok"] for check in checks))


# --- explanations

TRACEBACKS = {
    "AttributeError: 'ChatGLMTokenizer' object has no attribute 'tokenizer'": "4.34",
    'File "modeling_characterglm.py", line 8\nValueError: too many values to unpack (expected 2)': "4.42",
    "TypeError: ChatGLMTokenizer._pad() got an unexpected keyword argument 'padding_side'": "4.45",
    "FileNotFoundError: [Errno 2] No such file or directory: '/root/autodl-tmp/x/quantization.py'": "4.45",
    "AttributeError: 'ChatGLMForConditionalGeneration' object has no attribute 'all_tied_weights_keys'": "5.0",
    "ValueError: Due to a serious vulnerability issue in `torch.load`, even with `weights_only=True`, we": "2.6",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0": "nvidia-smi",
    "RuntimeError: element 0 of tensors does not require grad and does not have a grad_fn": "enable_input_require",
    "ERROR: No matching distribution found for peft==0.4.0.dev0": "peft",
    '{"detail":"Method Not Allowed"}': "POST",
    "RuntimeError: asyncio.run() cannot be called from a running event loop": "await",
    "[Errno 98] error while attempting to bind on address ('127.0.0.1', 6006): address already in use": "6008",
    "RuntimeError: The NVIDIA driver on your system is too old (found version 11040).": "driver",
    "AssertionError: Torch not compiled with CUDA enabled": "CPU",
    "OSError: [Errno 28] No space left on device: 'checkpoint.bin'": "/root/autodl-tmp",
    "ModuleNotFoundError: No module named 'peft'": "kernel",
    "requests.exceptions.ProxyError: HTTPSConnectionPool(host='x', port=443)": "unset http_proxy",
    "Passed unknown parameter: TEMPRATURE": "papermill",
    "FileNotFoundError: [Errno 2] No such file or directory: '/root/autodl-tmp/qwen/x.json'": "download_model",
    "回复停不下来": "eos_token_id",
    "AttributeError: 'str' object has no attribute 'shape'": "4.42",
    "TypeError: _extract_past_from_model_output() got an unexpected keyword argument 'standardize_cache_format'": "4.44",
    "AttributeError: 'ChatGLMConfig' object has no attribute 'num_hidden_layers'": "4.56",
    "The repository x contains custom code which must be executed to correctly load the model.": "import helpers",
    "lora_B.default.weight is all zero": "adapter",
    "网页打不开": "ssh -CNg",
    "RuntimeError: No CUDA GPUs are available": "无卡模式",
    "ImportError: libtorch_cuda.so: undefined symbol: ncclCommRegister": "重新 make run",
    "ImportError: cannot import name 'is_torch_fx_available' from 'transformers.utils'": "import helpers",
    "RuntimeError: \"addmm_impl_cpu_\" not implemented for 'Half'": "float32",
    "ValueError: Attempting to unscale FP16 gradients.": "add_lora",
    "RuntimeError: expected scalar type Half but found Float": "dtype",
    "ValueError: Target modules {'query_key_value'} not found in the base model.": "convert --adapter",
    "ValueError: We need an `offload_dir` to dispatch this model": "nf4",
    "safetensors_rust.SafetensorError: Error while deserializing header: HeaderTooLarge": "--verify",
    "_pickle.UnpicklingError: Weights only load failed. This file can still be loaded": "官方权重",
    "ModuleNotFoundError: No module named 'bitsandbytes'": "pip install bitsandbytes",
    "ValueError: Blockwise quantization only supports 16/32-bit floats, but got torch.uint8": "未量化",
    "TypeError: Trainer.__init__() got an unexpected keyword argument 'tokenizer'": "processing_class",
    "UnicodeDecodeError: 'gbk' codec can't decode byte 0xa4 in position 64": "load_samples",
    "UnicodeEncodeError: 'gbk' codec can't encode character '\\U0001f917'": "PYTHONUTF8",
    "OSError: We couldn't connect to 'https://huggingface.co' to load this file": "helpers download",
    "modelscope.hub.errors.NotExistError: The request model: x/CharacterGLM-6B not exist": "THUCoAI",
    "RuntimeError: CUDA error: device-side assert triggered": "-100",
    "RuntimeError: Expected all tensors to be on the same device, but found two": "model.device",
    "AttributeError: 'CharacterGLMForCausalLM' object has no attribute 'chat'": "helpers.chat",
    "AttributeError: can't set attribute 'eos_token'": "import helpers",
    "ValueError: Can't find 'adapter_config.json' at './output/ChatGLM/'": "output_dir",
    "size mismatch for base_model.model.transformer.encoder.layers.0.lora_A": "底模",
    "ValueError: loss is nan": "学习率",
    "Killed": "内存",
    "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp": "NCCL_P2P_DISABLE",
    "json.decoder.JSONDecodeError: Extra data: line 2 column 1 (char 146)": "load_samples",
}


@pytest.mark.parametrize("text", TRACEBACKS, ids=lambda text: text[-30:])
def test_known_errors_are_explained_in_both_languages(text):
    found = explain(f"Traceback (most recent call last):\n{text}\n")
    assert TRACEBACKS[text] in "".join(map(str, found))
    assert all(re.search("[\u4e00-\u9fff]", error.way_out) and error.english.isascii() for error in found)


def test_every_text_that_readers_reported_is_explained():
    """Also the messages of this project, whole or only their key phrase."""
    source = ast.parse(shared("finetune_cases/error_texts.py").read_text(encoding="utf-8"))
    (texts,) = (node.value.value for node in source.body if isinstance(node, ast.Assign))
    rows = [line.partition("|")[2] for line in texts.splitlines()]
    assert len(rows) == 55
    assert [text for text in rows if not explain(text)] == []


def test_own_messages_are_those_of_the_code():
    with pytest.raises(CheckpointError) as caught:
        helpers.load("no such model")
    for line in (f"Traceback\nhelpers.errors.CheckpointError: {caught.value}", f"错误 [error]：{caught.value}\n"):
        (found,) = explain(line)
        assert str(caught.value) in found.way_out and "[unknown model]" in found.english
    (found,) = explain("[loss is not finite]")
    assert "试试十分之一" in found.way_out and "training" not in found.cause
    (found,) = explain("内存或显存不足 [out of memory]：")
    assert "per_device_train_batch_size" in found.way_out
    assert len(own_messages()) > 150 and "folder of a LoRA adapter" not in own_messages()  # a help text


def test_every_error_of_the_facts_is_explained():
    facts = shared("facts.md").read_text(encoding="utf-8")
    section = facts.split("## What breaks for people")[1].split("##")[0]
    rows = re.findall(r"^\| [~>=]*([\d.-]+)\S* \| (.+) \|$", section, re.MULTILINE)
    assert len(rows) == 7
    for _, errors in rows:
        for error in re.split(r" / |; ", errors):
            text = f"modeling_chatglm.py\n{error}" if "unpack" in error else error.replace(", '", "' no attribute '")
            assert explain(text), error


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x = names[busy]",
        "f()[busy]",
        "[never said]",
        "[user]你好",
        "ValueError: too many values to unpack",
        "KeyError: 'x'",
        "SyntaxError: invalid syntax",
        "all is well",
    ],
)
def test_other_errors_are_not_explained_away(text):
    assert explain(text) == []


def test_every_pattern_is_tried():
    unseen = [error.pattern for error in KNOWN_ERRORS if not any(re.search(error.pattern, text) for text in TRACEBACKS)]
    assert unseen == []


def test_explain_from_file_and_standard_input(tmp_path):
    def command(*options, **more):
        return CliRunner().invoke(app, ["doctor", "--explain", *options], **more)

    (tmp_path / "log.txt").write_text("x\nCUDA out of memory\n")
    done = command("log.txt")
    assert done.exit_code == 0
    assert "怎么办" in done.stdout and "In English" in done.stdout
    assert json.loads(command("log.txt", "--json").stdout)[0]["cause"]
    assert command("-", input="CUDA out of memory").stdout == done.stdout
    unknown = command("-", input="all is well")
    assert unknown.exit_code == 1
    assert "unknown error" in unknown.stdout
    with pytest.raises(HelpersError, match="cannot read"):
        command("gone.txt", catch_exceptions=False)
