"""What every unit test needs."""

import signal
import subprocess

import pytest
import torch

# The models here are tiny: a second thread gains nothing, and on a busy machine waiting for it takes minutes.
torch.set_num_threads(1)


@pytest.fixture
def interruptible():
    """A process that a shell started in the background ignores SIGINT, unless told otherwise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 8 MB: less than a copy of Nano takes."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"cannot mount a file system here (needs root): {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
