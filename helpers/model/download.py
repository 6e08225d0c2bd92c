"""CharacterGLM-6B from ModelScope: where it goes, whether it is there already, fetching it and checking every byte."""

import errno
import hashlib
import os
from fnmatch import fnmatch
from pathlib import Path

from ..errors import CheckpointError, HelpersError
from ..paths import MARGIN_BYTES, check_disk_space, write_json
from .checkpoint import REDOWNLOAD, WEIGHT_INDEXES, read_json, verify_checkpoint

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
MANIFEST = ".verified.json"  # beside the files: size and sha256 of each, written when all agreed with the hub
BLOCK_BYTES = 1 << 23
RESUME_AFTER = "已下载的部分会保留，解决后再运行一次就从断点继续："
PROXY_HINT = "；开过 network_turbo 的话先 unset http_proxy https_proxy"


def default_model_dir(model_id: str = MODEL_ID) -> Path:
    """Where a download goes: the data disk on AutoDL (50 GB, kept across shutdown), else `./models`."""
    base = AUTODL_DATA_DISK if AUTODL_DATA_DISK.is_dir() else Path("models")
    return base / model_id.split("/")[-1]


def candidate_dirs(model_id: str = MODEL_ID) -> list[Path]:
    """Where the model may be already: our own place, both path schemes of ModelScope's cache, Hugging Face's cache.

    modelscope <= 1.37 writes `{cache}/THUCoAI/CharacterGLM-6B` or `{cache}/models/THUCoAI/CharacterGLM-6B` (by default
    under `hub`), newer versions `{cache}/models/THUCoAI--CharacterGLM-6B/snapshots/master`.
    """
    cache = Path(os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope").expanduser()
    snapshot = Path(model_id.replace("/", "--")) / "snapshots" / "master"
    found = [default_model_dir(model_id), Path("models") / model_id.split("/")[-1]]
    for base in (AUTODL_DATA_DISK, cache, cache / "hub"):
        found += [base / model_id, base / "models" / model_id, base / "models" / snapshot]
    return found + _hugging_face_snapshots(model_id)


def _hugging_face_snapshots(model_id: str) -> list[Path]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return [Path(snapshot_download(HUGGING_FACE_IDS.get(model_id, model_id), local_files_only=True))]
    except LocalEntryNotFoundError:
        return []


def find_downloaded(model_id: str = MODEL_ID) -> Path | None:
    """The first candidate directory with a complete checkpoint, or None."""
    return next(filter(_is_complete, candidate_dirs(model_id)), None)


def verify_download(directory: Path) -> None:
    """Raise `CheckpointError` unless weights, config and tokenizer are there, of the sizes verified earlier.

    Takes milliseconds; for every byte see `damaged_files`.
    """
    verify_checkpoint(directory)
    if not (directory / "tokenizer.model").is_file():
        raise CheckpointError(f"缺少文件 tokenizer.model [missing file]：{directory}。{REDOWNLOAD}")
    for name, entry in _manifest(directory).items():
        if not (directory / name).is_file() or (directory / name).stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{name} 的大小变了 [size changed]：{directory}。{REDOWNLOAD}")


def _is_complete(directory: Path) -> bool:
    try:
        verify_download(directory)
    except CheckpointError:
        return False
    return True


def _manifest(directory: Path) -> dict[str, dict]:
    return read_json(directory / MANIFEST).get("files", {}) if (directory / MANIFEST).is_file() else {}


def download_model(model_id: str = MODEL_ID, local_dir: str | Path | None = None, *, verify: bool = False) -> Path:
    """Download a model from ModelScope (12.5 GB for the 6B), or find it where it already is.

    An interrupted download goes on where it stopped when you call this again.

    Args:
        local_dir: the target; by default `default_model_dir()`.
        verify: read every byte of a model that is already there, and fetch again what is damaged.

    Returns:
        The directory with the complete checkpoint.

    Raises:
        HelpersError: the disk is too full or not writable, ModelScope cannot be reached or does not have the model,
            or what it sends is not what it lists.
        CheckpointError: the download ended but files are missing or damaged.
    """
    target = Path(local_dir).expanduser() if local_dir is not None else default_model_dir(model_id)
    found = find_downloaded(model_id) if local_dir is None else target if _is_complete(target) else None
    if found and not (verify and damaged_files(found)):
        print(f"模型已经在这里 [already downloaded]：{found}" + ("，每个字节都对 [verified]" if verify else ""))
        return found
    target = found or target
    try:
        files = list_files(model_id)
        check_disk_space(target, bytes_needed(target, {name: size for name, (size, _) in files.items()}))
        _fetch(model_id, target, list(files))
    except KeyboardInterrupt:
        print("下载中断了 [interrupted]：已有的部分会保留，再运行一次会从断点继续")
        raise
    except HelpersError:
        raise
    except Exception as error:
        raise _explained(error, model_id, target) from error
    _verify_and_record(model_id, target, files)
    print(f"下载完成，大小和 sha256 都与 ModelScope 登记的一致 [downloaded and verified]：{target}")
    return target


def list_files(model_id: str) -> dict[str, tuple[int, str | None]]:
    """The files to fetch, as ModelScope lists them: name to (bytes, sha256 or None)."""
    from modelscope_hub import HubApi

    listed = {file.path: (file.size, file.sha256) for file in HubApi().list_repo_files(model_id, "model")}
    return {name: listed[name] for name in needed_files(listed)}


def needed_files(names) -> list[str]:
    """Of the files of a repository, those to fetch: settings, tokenizer, and the weights in one format.

    Safetensors if the repository has them, as `weight_files` prefers them, else `.bin`.

    Raises:
        HelpersError: there is no config.json, or there are no weights.
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


def _fetch(model_id: str, target: Path, names: list[str]) -> None:
    # The client gives a file 5 retries and an hour: too few for 10 GB over a bad line, so go on while it gets further.
    from modelscope import snapshot_download
    from modelscope_hub.errors import FileDownloadError, FileIntegrityError

    target.mkdir(parents=True, exist_ok=True)

    def present() -> int:
        return sum(_size_on_disk(target / name) for name in names)

    while True:
        before = present()
        try:
            snapshot_download(model_id, local_dir=str(target), allow_patterns=names)
            return
        except FileDownloadError as error:
            # A file with the wrong content was fetched three times already.
            wrong = any(isinstance(cause, FileIntegrityError) for cause in error.failed_files.values())
            if wrong or not error.retryable or present() <= before:
                raise


def _size_on_disk(file: Path) -> int:
    # The client writes NAME.incomplete and renames it when the file is whole.
    return next((path.stat().st_size for path in (file, Path(f"{file}.incomplete")) if path.is_file()), 0)


def _verify_and_record(model_id: str, target: Path, files: dict[str, tuple[int, str | None]]) -> None:
    # A version of modelscope reported success although files had failed: believe only what is on the disk.
    missing = [name for name in files if not (target / name).is_file()]
    if missing:
        raise CheckpointError(f"下载结束了，但缺少 {'、'.join(missing)} [missing file]：{target}。{REDOWNLOAD}")
    found = _measure(target, files)
    wrong = [
        name
        for name, (size, sha256) in files.items()
        if found[name]["bytes"] != size or found[name]["sha256"] != (sha256 or found[name]["sha256"])
    ]
    for name in wrong:
        (target / name).unlink()  # else the next start would take it for good
    if wrong:
        raise CheckpointError(
            f"{'、'.join(wrong)} 与 ModelScope 登记的大小或 sha256 不符 [wrong size or sha256]，已删除：{target}。{REDOWNLOAD}"
        )
    write_json(target / MANIFEST, {"model_id": model_id, "files": found})
    verify_download(target)


def damaged_files(directory: Path) -> list[str]:
    """Names of the files whose bytes are not those verified after the download; reads them all.

    A directory that was never verified gives the name of its missing manifest.
    """
    recorded = _manifest(directory)
    if not recorded:
        return [MANIFEST]
    found = _measure(directory, [name for name in recorded if (directory / name).is_file()])
    damaged = [name for name, entry in recorded.items() if found.get(name) != entry]
    if damaged:
        print(f"文件损坏，将重新下载 [damaged]：{'、'.join(damaged)}")
    return damaged


def _measure(directory: Path, names) -> dict[str, dict]:
    """Size and sha256 of files, with a progress bar: 12.5 GB take from ten seconds to a minute."""
    from tqdm.auto import tqdm

    sizes = {name: (directory / name).stat().st_size for name in names}
    with tqdm(total=sum(sizes.values()), desc="校验 sha256", unit="B", unit_scale=True) as progress:
        return {name: {"bytes": size, "sha256": _sha256(directory / name, progress)} for name, size in sizes.items()}


def _sha256(file: Path, progress) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
            progress.update(len(block))
    return digest.hexdigest()


def _explained(error: Exception, model_id: str, target: Path) -> HelpersError:
    """What went wrong in a download and the way out, from an exception of the client."""
    from modelscope_hub import errors as hub

    name, cause = next(iter(getattr(error, "failed_files", {}).items()), (None, error))
    cause = cause.__cause__ if isinstance(cause.__cause__, hub.HubError) else cause  # wrapped for older callers
    what = f"{model_id} 的 {name}" if name else model_id
    if (number := getattr(cause, "errno", None)) in (errno.ENOSPC, errno.EDQUOT):
        return HelpersError(
            f"磁盘写满了 [disk full]：{target} 所在的磁盘。{RESUME_AFTER}清理数据盘、或换一个 local_dir"
        )
    if number in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
        return HelpersError(f"不能写入 [cannot write]：{target}（{cause.strerror}）。请把 local_dir 指到可写的目录")
    reasons = [
        (hub.NotExistError, f"ModelScope 上没有 {what} [not found, HTTP 404]：请检查模型名"),
        (
            (hub.AuthenticationError, hub.PermissionDeniedError),
            f"ModelScope 不允许下载 {what} [access denied]：请先登录或申请",
        ),
        (hub.RateLimitError, f"请求太频繁，ModelScope 拒绝了 [rate limited, HTTP 429]。{RESUME_AFTER}等几分钟"),
        (hub.ServerError, f"ModelScope 的服务器出错 [server error]（{what}）。{RESUME_AFTER}等几分钟"),
        (
            hub.FileIntegrityError,
            f"收到的 {what} 与 ModelScope 登记的大小或 sha256 不符 [wrong size or sha256]，没有保留。请换一个网络或关掉代理再试",
        ),
        (hub.RequestTimeoutError, f"连接停住了 [stalled]（{what}）。{RESUME_AFTER}检查网络{PROXY_HINT}"),
        (
            hub.NetworkError,
            f"连不上 ModelScope，或连接断了 [no connection]（{what}）。{RESUME_AFTER}检查网络{PROXY_HINT}",
        ),
    ]
    for kinds, message in reasons:
        if isinstance(cause, kinds):
            return HelpersError(message)
    return HelpersError(f"下载没有完成 [download failed]（{what}）：{cause}。再运行一次会从断点继续")


def bytes_needed(target: Path, sizes: dict[str, int] = EXPECTED_SIZES) -> int:
    """Free space that a download into `target` needs: what is not there yet of the files in `sizes`, plus 1 GB."""
    return MARGIN_BYTES + sum(max(0, size - _size_on_disk(target / name)) for name, size in sizes.items())
