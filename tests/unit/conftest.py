"""What every unit test needs."""

import torch

# The models here are tiny: a second thread gains nothing, and on a busy machine waiting for it takes minutes.
torch.set_num_threads(1)
