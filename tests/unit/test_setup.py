"""Set-up without a network: which Python, which torch, new environment or old, and when make calls it at all."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SETUP_FILES = (
    "requirements.txt",
    "requirements-cluster.txt",
    "requirements-dev.txt",
    "constraints.txt",
    "pyproject.toml",
)
PROJECT_FILES = (*SETUP_FILES, "Makefile")
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
CANDIDATES = ("python3", "python3.13", "python3.12", "python3.11", "python")

STUB_PYTHON = """#!/bin/bash
# Stands for .venv/bin/python: answers what setup.sh asks and writes down what it is told to install.
root="$(dirname "$0")/../.."
case "$*" in
    *_base_executable*) echo "{python}" ;;
    *torch*__version__*) cat "$root/torch_version" ;;
    *"pip install"*)
        echo "$*" >>"$root/pip.log"
        for word in "$@"; do
            case "$word" in /tmp/*|/var/*) cat "$word" >>"$root/pin.log" ;; torch==*) echo 2.13.0 >"$root/torch_version" ;; esac
        done
        if [ -e "$root/meddle" ]; then echo 2.99.0 >"$root/torch_version"; fi
        if [ -e "$root/no_network" ]; then exit 1; fi ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with what set-up reads, and nothing else."""
    folder = tmp_path / "a project"
    (folder / "scripts").mkdir(parents=True)
    for name in PROJECT_FILES:
        shutil.copy(REPOSITORY / name, folder / name)
    for script in (REPOSITORY / "scripts").glob("*.sh"):
        shutil.copy(script, folder / "scripts" / script.name)
    return folder


def fake_python(file: Path, *, version: tuple[int, int] = (3, 12), torch: str | None = None) -> Path:
    """A command that is the real Python, but of another version and with another torch, or none."""
    packages = file.parent / f"{file.name}_packages"
    (packages / "torch").mkdir(parents=True)
    (packages / "sitecustomize.py").write_text(
        f"import sys\nsys.version_info = {(*version, 1, 'final', 0)}\nsys._base_executable = {str(file)!r}\n"
    )
    (packages / "torch" / "__init__.py").write_text(f"__version__ = {torch!r}" if torch else "raise ImportError")
    if torch:
        info = packages / f"torch-{torch}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {torch}\n")
    file.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}" exec "{sys.executable}" "$@"\n')
    file.chmod(0o755)
    return file


def shell(project: Path, *command: str, path: Path | str = "", **variables: str) -> subprocess.CompletedProcess:
    """Run a command in the project with nothing but this environment."""
    environment = {"PATH": f"{path}:{SYSTEM_PATH}" if path else SYSTEM_PATH, "HOME": str(project)} | variables
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=120)


def plan(project: Path, python: Path | str) -> dict[str, str]:
    """What setup.sh says that it would do."""
    done = shell(project, "bash", "scripts/setup.sh", "--print-plan", PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return dict(line.split("=", 1) for line in lines[:4]) | {"reason": lines[4]}


@pytest.mark.parametrize(
    ("torch", "kind", "reason"),
    [
        (None, "plain", "no torch found"),
        ("1.13.1", "plain", "torch too old"),
        ("2.5.1+cu124", "plain", "torch too old"),
        ("2.6.0", "system", "image torch kept"),
        ("2.8.0+cu128", "system", "image torch kept"),
        ("2.10.0", "system", "image torch kept"),
        ("2.8.0a0+5228986c39.nv25.6", "system", "image torch kept"),
        ("3.0.0", "system", "image torch kept"),
    ],
)
def test_an_image_torch_is_kept_if_new_enough(
    project: Path, tmp_path: Path, torch: str | None, kind: str, reason: str
) -> None:
    python = fake_python(tmp_path / "python3", torch=torch)
    found = plan(project, python)
    assert found["python"] == str(python)
    assert found["torch"] == (torch or "none")
    assert (found["kind"], found["action"]) == (kind, "create")
    assert reason in found["reason"]


def test_the_first_python_that_is_new_enough_is_taken(project: Path, tmp_path: Path) -> None:
    fake_python(tmp_path / "python3", version=(3, 9))
    for name in ("python3.13", "python3.12"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 127\n")  # as a version manager's shim does
        (tmp_path / name).chmod(0o755)
    python = fake_python(tmp_path / "python3.11", version=(3, 11))
    done = shell(project, "bash", "scripts/setup.sh", "--print-plan", path=tmp_path)
    assert f"python={python}\n" in done.stdout


def test_only_old_pythons_is_a_clear_error(project: Path, tmp_path: Path) -> None:
    for name in CANDIDATES:
        fake_python(tmp_path / name, version=(3, 10))
    done = shell(project, "bash", "scripts/setup.sh", path=tmp_path)
    assert done.returncode == 1
    assert "Python >= 3.11 required" in done.stderr
    assert not (project / ".venv").exists()


def test_a_chosen_python_is_never_replaced_by_another(project: Path, tmp_path: Path) -> None:
    old = fake_python(tmp_path / "old", version=(3, 10))
    for python in (old, tmp_path / "missing"):
        done = shell(project, "bash", "scripts/setup.sh", PYTHON=str(python))
        assert done.returncode == 1
        assert f"PYTHON={python}" in done.stderr


@pytest.mark.parametrize("name", ["br{a}ces", "$money"])
def test_a_folder_that_setuptools_cannot_install_from_is_refused_at_once(project: Path, name: str) -> None:
    moved = project.rename(project.with_name(name))
    done = shell(moved, "bash", "scripts/setup.sh")
    assert done.returncode == 1 and "[unusable path]" in done.stderr and name in done.stderr
    assert not (moved / ".venv").exists()


def test_missing_venv_module_says_what_to_type(project: Path, tmp_path: Path) -> None:
    python = fake_python(tmp_path / "python3")
    with (tmp_path / "python3_packages" / "sitecustomize.py").open("a") as file:
        file.write("sys.modules['ensurepip'] = None\n")
    done = shell(project, "bash", "scripts/setup.sh", PYTHON=str(python))
    assert done.returncode == 1
    assert "apt-get install -y python3-venv" in done.stderr


def test_environment_is_used_again_only_if_whole_and_in_place(project: Path, tmp_path: Path) -> None:
    python = sys._base_executable
    options = ["--system-site-packages"] if plan(project, python)["kind"] == "system" else []
    subprocess.run([python, "-m", "venv", *options, str(project / ".venv")], check=True)
    assert plan(project, python)["action"] == "reuse"
    assert plan(project, project / ".venv/bin/python")["action"] == "reuse"

    other = fake_python(tmp_path / "image_python", torch=None if options else "2.8.0")
    assert plan(project, other)["action"] == "recreate"

    moved = project.rename(tmp_path / "moved")
    assert plan(moved, python)["action"] == "recreate"
    moved.rename(project)

    (record,) = (project / ".venv").glob("lib/python*/site-packages/pip-*.dist-info/RECORD")
    content = record.read_bytes()
    record.unlink()
    assert plan(project, python)["action"] == "recreate"
    record.write_bytes(content)
    assert plan(project, python)["action"] == "reuse"

    (project / ".venv/bin/python").unlink()
    assert plan(project, python)["action"] == "recreate"


@pytest.fixture
def installed(project: Path, tmp_path: Path) -> Path:
    """A project whose environment is a stub that only writes down what is installed."""
    fake_python(tmp_path / "python3", torch="2.8.0+cu128")
    info = project / ".venv/lib/python3.12/site-packages/pip-1.dist-info"
    info.mkdir(parents=True)
    (info / "RECORD").touch()
    use_kind(project, tmp_path, torch="2.8.0+cu128")
    stub = project / ".venv/bin/python"
    stub.parent.mkdir()
    stub.write_text(STUB_PYTHON.replace("{python}", str(tmp_path / "python3")))
    stub.chmod(0o755)
    return project


def use_kind(project: Path, tmp_path: Path, *, torch: str | None) -> None:
    """Make Python and environment those of an image with this torch, or of one without."""
    shutil.rmtree(tmp_path / "python3_packages")
    fake_python(tmp_path / "python3", torch=torch)
    command = f"command = {tmp_path}/python3 -m venv {project}/.venv"
    system = "true" if torch else "false"
    (project / ".venv/pyvenv.cfg").write_text(f"include-system-site-packages = {system}\n{command}\n")
    (project / "torch_version").write_text(torch or "")


def set_up(project: Path, tmp_path: Path) -> subprocess.CompletedProcess:
    """Run setup.sh for real."""
    return shell(project, "bash", "scripts/setup.sh", PYTHON=str(tmp_path / "python3"))


def test_image_torch_is_pinned_while_the_rest_is_installed(installed: Path, tmp_path: Path) -> None:
    done = set_up(installed, tmp_path)
    assert done.returncode == 0, done.stderr
    (requirements,) = (installed / "pip.log").read_text().splitlines()
    assert "-r requirements-dev.txt -c constraints.txt -c" in requirements
    assert "-e ." in (installed / "requirements.txt").read_text().splitlines()
    assert (installed / "pin.log").read_text() == "torch==2.8.0+cu128\n"
    assert (installed / ".venv/.ready").read_text() == f"{installed}\n"


def test_tested_torch_is_installed_before_everything_else(installed: Path, tmp_path: Path) -> None:
    use_kind(installed, tmp_path, torch=None)
    done = set_up(installed, tmp_path)
    assert done.returncode == 0, done.stderr
    log = (installed / "pip.log").read_text().splitlines()
    assert "torch==2.13.0" in log[0]
    assert "requirements-dev.txt" in log[1]
    assert (installed / "pin.log").read_text() == "torch==2.13.0\n"


@pytest.mark.parametrize(("event", "message"), [("meddle", "torch changed"), ("no_network", "")])
def test_no_stamp_unless_all_went_well(installed: Path, tmp_path: Path, event: str, message: str) -> None:
    (installed / ".venv/.ready").touch()
    (installed / event).touch()
    done = set_up(installed, tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert not (installed / ".venv/.ready").exists()
    assert (installed / ".venv/bin/python").exists()


def make_calls_setup(project: Path) -> bool:
    """Whether `make` would run set-up now."""
    done = shell(project, "make", "-n", "setup")
    assert done.returncode == 0, done.stderr
    return "scripts/setup.sh" in done.stdout


def test_make_sets_up_only_when_something_changed(installed: Path) -> None:
    assert make_calls_setup(installed)
    ready = installed / ".venv/.ready"
    ready.write_text(f"{installed}\n")
    assert not make_calls_setup(installed)

    for name in (*SETUP_FILES, "scripts/setup.sh"):
        os.utime(installed / name, (ready.stat().st_mtime + 5,) * 2)
        assert make_calls_setup(installed), name
        os.utime(installed / name, (ready.stat().st_mtime - 5,) * 2)
    assert not make_calls_setup(installed)

    python = installed / ".venv/bin/python"
    python.rename(python.with_name("kept"))
    assert make_calls_setup(installed)
    python.with_name("kept").rename(python)
    assert not make_calls_setup(installed)

    moved = installed.rename(installed.with_name("moved"))
    assert make_calls_setup(moved)


def test_make_without_target_lists_the_targets(project: Path) -> None:
    listed = shell(project, "make").stdout
    for target in (
        "run",
        "notebooks",
        "refresh",
        "test",
        "test-slow",
        "lint",
        "lab",
        "kernel",
        "bench",
        "nano",
        "clean",
    ):
        assert f"\n{target} " in f"\n{listed}"


def get_browser(project: Path, tmp_path: Path, **stubs: str) -> tuple[str, bool]:
    """What get_browser.sh says where only these commands exist, and whether it called apt-get."""
    for name in ("bash", "timeout"):
        (tmp_path / name).symlink_to(shutil.which(name))
    for name, body in stubs.items():
        (tmp_path / name.replace("_", "-")).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name.replace("_", "-")).chmod(0o755)
    script = str(project / "scripts/get_browser.sh")
    done = subprocess.run(
        ["bash", script], env={"PATH": str(tmp_path)}, cwd=project, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, (project / "apt.log").exists()


APT = "echo $* >>apt.log"


def test_a_browser_that_is_there_is_enough(project: Path, tmp_path: Path) -> None:
    assert get_browser(project, tmp_path, chromium="exit 0", id="echo 0", apt_get=APT) == ("", False)


def test_a_browser_that_cannot_be_installed_is_no_failure(project: Path, tmp_path: Path) -> None:
    said, called = get_browser(project, tmp_path, id="echo 0", apt_get=f"{APT}; exit 100")
    assert called
    assert "could not be installed" in said


def test_without_root_nothing_is_installed(project: Path, tmp_path: Path) -> None:
    said, called = get_browser(project, tmp_path, id="echo 1000", apt_get=APT)
    assert not called
    assert "no Chromium or Chrome found" in said
