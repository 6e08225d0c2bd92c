"""Errors that people meet with CharacterGLM, recognised by their text: why they happen and the way out."""

import re
from dataclasses import dataclass

NO_REMOTE_CODE = "先 import helpers，再用标准的 AutoTokenizer / AutoModelForCausalLM，不要执行远程代码"
NO_REMOTE_CODE_EN = "import helpers first, then stock AutoTokenizer / AutoModelForCausalLM; run no remote code"


@dataclass(frozen=True)
class KnownError:
    """An error: a regular expression for its text, the cause, and the way out in Chinese and in English."""

    pattern: str
    cause: str
    way_out: str
    english: str

    def __str__(self) -> str:
        return f"原因：{self.cause}\n怎么办：{self.way_out}\nIn English: {self.english}"


def _remote_code(pattern: str, since: str) -> KnownError:
    cause = f"旧的远程代码与 transformers {since} 不兼容"
    return KnownError(
        pattern, cause, NO_REMOTE_CODE, f"The old remote code breaks with transformers {since}: {NO_REMOTE_CODE_EN}."
    )


KNOWN_ERRORS = (
    _remote_code(r"'ChatGLMTokenizer' object has no attribute '(tokenizer|sp_tokenizer)'", ">= 4.34"),
    _remote_code(r"'str' object has no attribute 'shape'", "4.42-4.43"),
    _remote_code(r"(?s)modeling_\w*glm.*too many values to unpack", "4.42-4.43"),
    _remote_code(r"_extract_past_from_model_output\(\) got an unexpected keyword argument", ">= 4.44"),
    _remote_code(r"_pad\(\) got an unexpected keyword argument 'padding_side'", ">= 4.45"),
    _remote_code(r"FileNotFoundError.*quantization\.py", ">= 4.45"),
    _remote_code(r"'ChatGLMConfig' object has no attribute 'num_hidden_layers'", ">= 4.56"),
    _remote_code(r"no attribute '(max_length|all_tied_weights_keys)'", ">= 5.0"),
    KnownError(
        r"contains custom code which must be executed|does not recognize this architecture",
        "transformers 还不认识 model_type: chatglm",
        NO_REMOTE_CODE,
        f"transformers does not know this model yet: {NO_REMOTE_CODE_EN}.",
    ),
    KnownError(
        r"serious vulnerability issue in .?torch\.load",
        "torch 低于 2.6，transformers 拒绝用它读 .bin 权重",
        "换 torch 2.6 以上的镜像；或运行 make run，它会在 .venv 里另装一个，不动镜像的",
        "torch is older than 2.6: use a newer image, or `make run`, which installs another torch in .venv only.",
    ),
    KnownError(
        r"(?i)cuda out of memory|CUDA error: out of memory|OutOfMemoryError",
        "显存不够：被别的进程占着，或这个任务对这块 GPU 太大",
        "nvidia-smi 看谁在用，关掉其他 notebook 的 kernel；减小 batch 或长度，打开 gradient checkpointing，"
        "或 quantization='nf4'；helpers.estimate(...) 能先算好",
        "Too little GPU memory: stop other kernels (nvidia-smi), reduce batch or length, use gradient checkpointing or "
        "quantization='nf4'; helpers.estimate(...) tells in advance.",
    ),
    KnownError(
        r"element 0 of tensors does not require grad",
        "gradient checkpointing 切断了梯度：embedding 是冻结的，第一个 checkpoint 的输入没有梯度",
        "训练前调用 model.enable_input_require_grads()，并用 use_reentrant=False",
        "Gradient checkpointing cut the graph: call model.enable_input_require_grads() before training.",
    ),
    KnownError(
        r"lora_B\S* (is|are) all zero|LoRA (without|has no) effect|LoRA 没有效果",
        "lora_B 全是零：adapter 没有训练过，或加载的是训练前的目录",
        "用 helpers.load(adapter=目录)，它会检查权重是否齐全；确认训练的 loss 下降了，目录里有 adapter_model.safetensors",
        "lora_B is zero, so the adapter was never trained: use helpers.load(adapter=...), check that the loss fell.",
    ),
    KnownError(
        r"endless repl|回复停不下来|停不下来",
        "没有把换行 (id 13) 当作停止 token：模型会接着替用户说话",
        "用 helpers.chat，或给 generate 传 eos_token_id=[2, 13]",
        "A reply ends at the newline token: use helpers.chat, or pass eos_token_id=[2, 13] to generate.",
    ),
    KnownError(
        r"No matching distribution found for peft==0\.4\.0\.dev0",
        "peft 0.4.0.dev0 是没有发布过的开发版",
        "用 make run 装本项目 requirements.txt 里的版本",
        "peft 0.4.0.dev0 was never published: install requirements.txt with `make run`.",
    ),
    KnownError(
        r"(?i)method not allowed",
        "用浏览器 (GET) 打开了只接受 POST 的地址",
        "用 curl -X POST 或 requests.post 发送 JSON，或打开 /docs 在页面上试",
        "The address takes POST: send JSON with curl -X POST or requests.post, or open /docs.",
    ),
    KnownError(
        r"asyncio\.run\(\) cannot be called from a running event loop|event loop is already running",
        "JupyterLab 里已经有一个 event loop",
        "在 notebook 里用 await，或把服务写成脚本在另一个进程里启动",
        "JupyterLab runs an event loop already: use await, or start the server in another process.",
    ),
    KnownError(
        r"(?i)address already in use|Cannot find empty port",
        "这个端口被另一个进程占着",
        "python -m helpers doctor 会说出是谁；停掉它，或换一个端口，例如 --port 6008",
        "Another process has the port: `python -m helpers doctor` names it; stop it or use --port 6008.",
    ),
    KnownError(
        r"(?i)(page|网页|页面)\S* (unreachable|打不开)|ERR_CONNECTION_REFUSED|打不开",
        "AutoDL 只开放 6006 和 6008 端口；个人账号要用 SSH 隧道",
        "让服务监听 127.0.0.1:6006，在自己的电脑上运行 ssh -CNg -L 6006:127.0.0.1:6006 root@主机 -p 端口，再打开 http://127.0.0.1:6006",
        "AutoDL opens only ports 6006 and 6008: serve on 6006 and open an SSH tunnel to it.",
    ),
    KnownError(
        r"NVIDIA driver on your system is too old|driver version is insufficient",
        "torch 带的 CUDA 比宿主机的驱动新：多半是重装了 torch",
        "换回镜像自带的 torch：删掉 .venv，重新 make run；或租 CUDA 版本更高的机器",
        "This torch needs a newer driver, usually after torch was reinstalled: go back to the image's torch "
        "(remove .venv, `make run`), or rent a machine with a newer CUDA.",
    ),
    KnownError(
        r"Torch not compiled with CUDA enabled",
        "装成了 CPU 版的 torch",
        "换回镜像自带的 torch：删掉 .venv，重新 make run",
        "This torch is a CPU build: remove .venv and run `make run` to use the image's torch.",
    ),
    KnownError(
        r"Found no NVIDIA driver|No CUDA GPUs are available",
        "没有 GPU：可能是无卡模式开机",
        "在 AutoDL 控制台关机，再以有卡模式开机；没有 GPU 时用 MODEL='nano'",
        "No GPU, perhaps the machine was booted without one: boot with a GPU, or use MODEL='nano'.",
    ),
    KnownError(
        r"undefined symbol|CUDA error: no kernel image is available",
        "torch 与别的 CUDA 包版本混在一起了：多半是重装过其中一个",
        "删掉 .venv，重新 make run；还不行就重置镜像",
        "torch and CUDA packages of different versions are mixed: remove .venv, `make run`, or reset the image.",
    ),
    KnownError(
        r"No space left on device",
        "磁盘满了：AutoDL 的系统盘只有 30 GB",
        "模型和输出放到数据盘 /root/autodl-tmp；du -sh ~/* /root/autodl-tmp/* 看什么占了地方",
        "The disk is full: keep models and outputs on /root/autodl-tmp; find large folders with du -sh.",
    ),
    KnownError(
        r"No module named '(helpers|transformers|peft|modelscope|datasets|gradio|fastapi)'",
        "notebook 的 kernel 不是装了依赖的那个 Python",
        "运行 make run 和 make kernel，然后在 JupyterLab 右上角选名为 CharacterGLM 的 kernel",
        "The notebook's kernel is another Python: run `make run` and `make kernel`, then pick the CharacterGLM kernel.",
    ),
    KnownError(
        r"ProxyError|Cannot connect to proxy|Unable to connect to proxy|Tunnel connection failed",
        "network_turbo 的代理还开着，它不能访问国内源",
        "unset http_proxy https_proxy，再试一次",
        "A proxy (network_turbo) is in the way: unset http_proxy https_proxy and try again.",
    ),
    KnownError(
        r"(?i)passed unknown parameter|\[unknown parameter\]",
        "papermill 的 -p 参数名写错了，它只警告，然后照默认值运行",
        "参数名区分大小写，见 notebook 的参数格；python -m helpers run 会拒绝写错的名字",
        "A papermill parameter is misspelt: see the notebook's parameters cell; `python -m helpers run` refuses it.",
    ),
    KnownError(
        r"(FileNotFoundError|HFValidationError|OSError|不存在).*/(root/autodl-tmp|home|Users)/\S+",
        "代码里写着别人机器上的路径",
        "用 MODEL='6b' 或 helpers.download_model() 返回的路径",
        "The code holds a path of somebody else's machine: use MODEL='6b', or what helpers.download_model() returns.",
    ),
)


def explain(text: str) -> list[KnownError]:
    """The known errors whose text occurs in `text`, a traceback or a log, in the order of `KNOWN_ERRORS`."""
    return [error for error in KNOWN_ERRORS if re.search(error.pattern, text)]
