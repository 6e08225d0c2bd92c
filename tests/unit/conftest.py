"""What every unit test needs."""

import signal

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
