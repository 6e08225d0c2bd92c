"""CharacterGLM-6B from ModelScope: where it goes, whether it is there already, fetching it and checking every byte."""

import errno
import os
from fnmatch import fnmatch
from pathlib import Path

from ..errors import CheckpointError, HelpersError
from ..paths import MARGIN_BYTES, check_disk_space, write_json
from .checkpoint import WEIGHT_INDEXES, check_checkpoint, damaged, read_json

MODEL_ID = "THUCoAI/CharacterGLM-6B"
HUGGING_FACE_IDS = {MODEL_ID: "thu-coai/CharacterGLM-6B"}
AUTODL_DATA_DISK = Path("/root/autodl-tmp")
# About what the hub lists for the 6B, for a disk check without a network; the other files are 1 MB together.
EXPECTED_SIZES = {"pytorch_model-00001-of-00002.bin": 10_000_000_000, "pytorch_model-00002-of-00002.bin": 2_500_000_000}
# What the model needs. Not here, so never fetched: remote code, weights in other formats, anything in a subfolder.
SETTINGS = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"),
    *("README.md", "*LICENSE*"),
)
WEIGHT_FORMATS = (("model*.safetensors", WEIGHT_INDEXES[0]), ("pytorch_model*.bin", WEIGHT_INDEXES[1]))
MANIFEST = ".verified.json"  # beside the files: the size of each, written when all agreed with the hub
RESUME_AFTER = "已下载的部分会保留，解决后再运行一次就从断点继续："
CHECK_NETWORK = f"{RESUME_AFTER}检查网络；开过 network_turbo 的话先 unset http_proxy https_proxy"
REASONS = {  # by the number of the system's error, or the name of the client's exception
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT),
        f"磁盘写满了 [disk full]：{{target}} 所在的磁盘。{RESUME_AFTER}清理数据盘、或换一个 local_dir",
    ),
    **dict.fromkeys(
        (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST),
        "不能写入 [cannot write]：{target}（{cause}）。请把 local_dir 指到可写的目录",
    ),
    "NotExistError": "ModelScope 上没有 {what} [not found, HTTP 404]：请检查模型名",
    **dict.fromkeys(
        ("AuthenticationError", "PermissionDeniedError"),
        "ModelScope 不允许下载 {what} [access denied]：请先登录或申请",
    ),
    "RateLimitError": f"请求太频繁，ModelScope 拒绝了 [rate limited, HTTP 429]。{RESUME_AFTER}等几分钟",
    "ServerError": f"ModelScope 的服务器出错 [server error]（{{what}}）。{RESUME_AFTER}等几分钟",
    "FileIntegrityError": "收到的 {what} 与 ModelScope 登记的大小或 sha256 不符 [wrong size or sha256]，没有保留。"
    "请换一个网络或关掉代理再试",
    "RequestTimeoutError": f"连接停住了 [stalled]（{{what}}）。{CHECK_NETWORK}",
    "NetworkError": f"连不上 ModelScope，或连接断了 [no connection]（{{what}}）。{CHECK_NETWORK}",
    "Exception": "下载没有完成 [download failed]（{what}）：{cause}。再运行一次会从断点继续",
}


def default_model_dir(model_id: str = MODEL_ID) -> Path:
    """Where a download goes: the data disk on AutoDL (50 GB, kept across shutdown), else `./models`."""
    return (AUTODL_DATA_DISK if AUTODL_DATA_DISK.is_dir() else Path("models")) / model_id.split("/")[-1]


def find_downloaded(model_id: str = MODEL_ID) -> Path | None:
    """The first complete checkpoint in our own place, in ModelScope's cache (three path schemes), in Hugging Face's.

    modelscope <= 1.37 writes `{cache}/THUCoAI/CharacterGLM-6B` or `{cache}/models/THUCoAI/CharacterGLM-6B` (by default
    under `hub`), newer versions `{cache}/models/THUCoAI--CharacterGLM-6B/snapshots/master`.
    """
    from huggingface_hub import try_to_load_from_cache

    cache = Path(os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope").expanduser()
    snapshot = Path("models") / model_id.replace("/", "--") / "snapshots" / "master"
    places = [default_model_dir(model_id), Path("models") / model_id.split("/")[-1]]
    for base in (AUTODL_DATA_DISK, cache, cache / "hub"):
        places += [base / model_id, base / "models" / model_id, base / snapshot]
    config = try_to_load_from_cache(HUGGING_FACE_IDS.get(model_id, model_id), "config.json")
    if isinstance(config, str):
        places.append(Path(config).parent)
    return next(filter(_is_complete, places), None)


def check_download(directory: Path) -> None:
    """Raise `CheckpointError` unless weights, config and tokenizer are there, of the sizes they had when downloaded."""
    check_checkpoint(directory)
    if not (directory / "tokenizer.model").is_file():
        raise damaged("缺少文件 tokenizer.model [missing file]", directory)
    recorded = read_json(directory / MANIFEST)["files"] if (directory / MANIFEST).is_file() else {}
    for name, entry in recorded.items():
        if not (directory / name).is_file() or (directory / name).stat().st_size != entry["bytes"]:
            raise damaged(f"{name} 的大小变了 [size changed]", directory)


def _is_complete(directory: Path) -> bool:
    try:
        check_download(directory)
    except CheckpointError:
        return False
    return True


def download_model(model_id: str = MODEL_ID, local_dir: str | Path | None = None, *, verify: bool = False) -> Path:
    """Download a model from ModelScope (12.5 GB for the 6B), or find it where it already is; returns its directory.

    An interrupted download goes on where it stopped when you call this again. Whatever stops it is a `HelpersError`.

    Args:
        local_dir: the target; by default `default_model_dir()`.
        verify: compare every byte of a model that is there with what ModelScope lists, and fetch what is damaged.
    """
    found = find_downloaded(model_id) if local_dir is None else None
    target = found or Path(local_dir or default_model_dir(model_id)).expanduser()
    complete = _is_complete(target)
    if complete and not verify:
        print(f"模型已经在这里 [already downloaded]：{target}")
        return target
    try:
        _download(model_id, target, complete)
    except KeyboardInterrupt:
        print("下载中断了 [interrupted]：已有的部分会保留，再运行一次会从断点继续")
        raise
    except HelpersError:
        raise
    except Exception as error:
        raise _explained(error, model_id, target) from error
    return target


def _download(model_id: str, target: Path, complete: bool) -> None:
    from modelscope_hub import HubApi

    listed = {file.path: file.size for file in HubApi().list_repo_files(model_id, "model")}
    files = {name: listed[name] for name in needed_files(listed)}
    if complete:
        if not (wrong := damaged_files(model_id, target, files)):
            print(f"模型已经在这里 [already downloaded]：{target}，每个字节都对 [verified]")
            return
        print(f"文件损坏，将重新下载 [damaged]：{'、'.join(wrong)}")
    check_disk_space(target, bytes_needed(target, files))
    _fetch(model_id, target, files)
    # A version of modelscope reported success although files had failed: believe only what is on the disk.
    wrong = damaged_files(model_id, target, files)
    for name in wrong:
        (target / name).unlink(missing_ok=True)  # else the next start would take it for good
    if wrong:
        problem = f"{'、'.join(wrong)} 缺少，或与 ModelScope 登记的大小或 sha256 不符 [wrong size or sha256]，已删除"
        raise damaged(problem, target)
    write_json(target / MANIFEST, {"model_id": model_id, "files": {name: {"bytes": files[name]} for name in files}})
    check_download(target)
    print(f"下载完成，大小和 sha256 都与 ModelScope 登记的一致 [downloaded and verified]：{target}")


def needed_files(names) -> list[str]:
    """Of the files of a repository, those to fetch: settings, tokenizer, and the weights in one format.

    Safetensors if the repository has them, as `weight_files` prefers them, else `.bin`.
    """
    top = [name for name in names if "/" not in name and "\\" not in name]
    settings = [name for name in top if any(fnmatch(name, pattern) for pattern in SETTINGS)]
    for pattern, index in WEIGHT_FORMATS:
        weights = [name for name in top if fnmatch(name, pattern)]
        if weights and "config.json" in settings:
            return settings + weights + [name for name in top if name == index]
    raise HelpersError(
        f"这个仓库里没有可用的模型 [no model in this repository]：它只有 {'、'.join(top) or '空目录'}。请检查模型名"
    )


def _fetch(model_id: str, target: Path, files: dict[str, int]) -> None:
    # The client gives a file 5 retries and an hour: too few for 10 GB over a bad line, so go on while it gets further.
    from modelscope import snapshot_download
    from modelscope_hub.errors import FileDownloadError, FileIntegrityError

    target.mkdir(parents=True, exist_ok=True)
    while True:
        missing = bytes_needed(target, files)
        try:
            snapshot_download(model_id, local_dir=str(target), allow_patterns=list(files))
            return
        except FileDownloadError as error:
            # A file with the wrong content was fetched three times already.
            wrong = any(isinstance(cause, FileIntegrityError) for cause in error.failed_files.values())
            if wrong or not error.retryable or bytes_needed(target, files) >= missing:
                raise


def damaged_files(model_id: str, directory: Path, files: dict[str, int]) -> list[str]:
    """Which of `files` (name to bytes) are not in `directory` byte for byte as ModelScope has them. Reads them all."""
    from modelscope_hub import HubApi

    print(f"校验 sha256，12.5 GB 约一分钟 [verifying]：{directory}")
    result = HubApi().verify_cache(model_id, local_dir=directory)
    differ = {*result.missing_paths, *(mismatch.path for mismatch in result.mismatches)}
    return [name for name, size in files.items() if name in differ or (directory / name).stat().st_size != size]


def _explained(error: Exception, model_id: str, target: Path) -> HelpersError:
    from modelscope_hub import errors as hub

    name, cause = next(iter(getattr(error, "failed_files", {}).items()), (None, error))
    cause = cause.__cause__ if isinstance(cause.__cause__, hub.HubError) else cause  # wrapped for older callers
    what = f"{model_id} 的 {name}" if name else model_id
    # The closest kind first: a timeout is also a NetworkError.
    keys = [getattr(cause, "errno", None), *(kind.__name__ for kind in type(cause).mro())]
    message = next(REASONS[key] for key in keys if key in REASONS)
    return HelpersError(message.format(what=what, target=target, cause=cause))


def bytes_needed(target: Path, sizes: dict[str, int] = EXPECTED_SIZES) -> int:
    """Free space that a download into `target` needs: what is not there yet of the files in `sizes`, plus 1 GB."""
    needed = MARGIN_BYTES
    for name, size in sizes.items():
        # The client writes NAME.incomplete and renames it when the file is whole.
        there = [path.stat().st_size for path in (target / name, target / f"{name}.incomplete") if path.is_file()]
        needed += max(0, size - there[0]) if there else size
    return needed
