"""Set-up for real: fresh virtual environments, the real pip, and small wheels on disk in the place of large libraries.

The image's torch lies in the user's site-packages: like the one in an image's own Python it is outside `.venv`, and an
environment that sees the system's packages sees it.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
SITE = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
BACKEND = """
import zipfile


def build_editable(directory, config_settings=None, metadata_directory=None):
    info = "project-1.dist-info"
    with zipfile.ZipFile(f"{directory}/project-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: project\\nVersion: 1\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return "project-1-py3-none-any.whl"
"""
FILES = {
    "requirements.txt": "torch>=2.6\nneeds-torch\n-e .\n",
    "requirements-dev.txt": "-r requirements.txt\nipykernel\n",
    "constraints.txt": "",
    "backend.py": BACKEND,
    "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
}


def make_wheel(folder: Path, name: str, version: str, *, requires: str = "", code: str = "") -> None:
    """A wheel with one package `name` and its `__version__`."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{module}/__init__.py": f"__version__ = {version!r}\n",
        f"{module}/__main__.py": code,
        f"{info}/METADATA": metadata + (f"Requires-Dist: {requires}\n" if requires else ""),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{path},sha256={_digest(text)},{len(text.encode())}" for path, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"])
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


def _digest(text: str) -> str:
    return urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """A home with a project that needs torch, and the wheels that pip may take; the newest torch is among them."""
    (tmp_path / "wheels").mkdir()
    for version in ("2.13.0", "2.99.0"):
        make_wheel(tmp_path / "wheels", "torch", version)
    make_wheel(tmp_path / "wheels", "needs-torch", "1.0", requires="torch>=2.0")
    make_wheel(tmp_path / "wheels", "ipykernel", "7.0")
    (tmp_path / "project/scripts").mkdir(parents=True)
    shutil.copy(REPOSITORY / "scripts/setup.sh", tmp_path / "project/scripts")
    for name, text in FILES.items():
        (tmp_path / "project" / name).write_text(text)
    return tmp_path


def put_image_torch(box: Path, version: str) -> Path:
    """Install torch where the image has it; returns the folder."""
    make_wheel(box, "torch", version)
    with zipfile.ZipFile(box / f"torch-{version}-py3-none-any.whl") as wheel:
        wheel.extractall(box / ".local" / SITE)
    return box / ".local" / SITE


def set_up(box: Path) -> subprocess.CompletedProcess:
    """Run setup.sh with nothing but this home and these wheels."""
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(box),
        "PYTHON": sys._base_executable,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(box / "wheels"),
    }
    command = ["bash", "scripts/setup.sh"]
    return subprocess.run(command, cwd=box / "project", env=environment, capture_output=True, text=True, timeout=300)


def seen_in_venv(box: Path, module: str) -> tuple[str, Path]:
    """(version, place) of a module as the new environment's Python imports it."""
    code = f"import {module} as m; print(m.__version__); print(m.__file__)"
    command = [str(box / "project/.venv/bin/python"), "-c", code]
    done = subprocess.run(command, env={"HOME": str(box)}, capture_output=True, text=True, check=True)
    version, place = done.stdout.splitlines()
    return version, Path(place)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the image's torch; compiled copies do not count."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_image_torch_is_used_and_untouched(box: Path) -> None:
    image = put_image_torch(box, "2.8.0+cu128")
    before = contents(image)
    done = set_up(box)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "image torch kept" in done.stdout
    version, place = seen_in_venv(box, "torch")
    assert (version, place.is_relative_to(image)) == ("2.8.0+cu128", True)
    assert seen_in_venv(box, "needs_torch")[1].is_relative_to(box / "project/.venv")
    assert contents(image) == before
    again = set_up(box)
    assert again.returncode == 0, again.stderr
    assert "reuse" in again.stdout
    assert contents(image) == before


@pytest.mark.parametrize(("image_version", "reason"), [("2.5.1+cu124", "torch too old"), (None, "no torch found")])
def test_old_or_missing_torch_gets_the_tested_one_in_venv_only(
    box: Path, image_version: str | None, reason: str
) -> None:
    image = put_image_torch(box, image_version) if image_version else None
    before = contents(image) if image else None
    done = set_up(box)
    if image is None and reason not in done.stdout:
        pytest.skip("the Python that runs the tests has a torch of its own")
    assert done.returncode == 0, done.stdout + done.stderr
    assert reason in done.stdout
    version, place = seen_in_venv(box, "torch")
    assert (version, place.is_relative_to(box / "project/.venv")) == ("2.13.0", True), "not the newest: the tested one"
    if image:
        assert contents(image) == before


def test_a_library_that_wants_another_torch_does_not_get_it(box: Path) -> None:
    image = put_image_torch(box, "2.8.0+cu128")
    before = contents(image)
    make_wheel(box / "wheels", "needs-torch", "2.0", requires="torch>=2.9")
    (box / "project/requirements.txt").write_text("torch>=2.6\nneeds-torch>=2\n")
    done = set_up(box)
    assert done.returncode != 0
    assert not (box / "project/.venv/.ready").exists()
    assert seen_in_venv(box, "torch")[0] == "2.8.0+cu128"
    assert contents(image) == before
