"""The training loop: no dropout, warm-up, a long constant stretch, and straight down to zero."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from .model import learnt_loss
from .optimizer import make_optimizers

WARM_UP = 100_000  # tokens
MEANING_WEIGHT = 1.0  # of the second loss


def learning_rate_factor(read: int, tokens: int, decay: int) -> float:
    """Warm-up, constant, and over the last `decay` tokens down to zero."""
    return max(0.0, min(1.0, read / WARM_UP, (tokens - read) / decay))


class Training:
    """A model, its optimizers, and how many tokens they have read; can be saved and taken up again.

    There are two losses. One is that of the next token, as ever. Where a reply begins, half of the layers must also know
    what the line before it means, which of `meanings`: 14 characters answer one meaning with 14 different words, from
    which alone a small model takes very long to see that the lines belong together. The matrix for this is not kept.
    """

    def __init__(self, model, batches: Iterator, meanings: int, matrix_rate: float = 0.03, other_rate: float = 6e-3):
        self.model, self.batches = model, batches
        self.to_meaning = torch.nn.Linear(model.config.hidden_size, meanings)
        self.optimizers = make_optimizers(model, matrix_rate, other_rate)
        self.optimizers[-1].add_param_group({"params": list(self.to_meaning.parameters())})
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.read, self.bfloat16 = 0, False

    def step(self, factor: float) -> tuple[float, float]:
        """Learn one batch at `factor` of the learning rates; returns its loss, and the share of meanings it knew."""
        ids, positions, begins, meanings = next(self.batches)
        for optimizer, rates in zip(self.optimizers, self.rates):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * factor
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            loss, middle = learnt_loss(self.model, ids, positions)
            scores = self.to_meaning(F.rms_norm(middle[begins], middle.shape[-1:]))
        (loss + MEANING_WEIGHT * F.cross_entropy(scores, meanings)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):  # the products inside Muon
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.read += ids.numel()
        return loss.item(), (scores.argmax(-1) == meanings).float().mean().item()

    def run(self, tokens: int, decay: int, on_log: Callable[[dict], None], log_every: int = 25) -> list[dict]:
        """Learn until `tokens` tokens have been read; returns a log line every `log_every` steps."""
        self.model.train()
        log, losses, start = [], [], time.process_time()
        while self.read < tokens:
            losses.append(self.step(learning_rate_factor(self.read, tokens, decay)))
            if len(losses) == log_every or self.read >= tokens:
                seconds = time.process_time() - start
                loss, known = (sum(each) / len(losses) for each in zip(*losses))
                log.append({"tokens": self.read, "loss": loss, "meanings_known": known, "cpu_seconds": seconds})
                on_log(log[-1])
                losses = []
        return log

    def save(self, file: Path) -> None:
        """Write weights, optimizers and position, so that a shorter or longer decay can start from here."""
        state = {"read": self.read, "model": self.model.state_dict(), "to_meaning": self.to_meaning.state_dict()}
        torch.save(state | {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}, file)

    def restore(self, file: Path) -> None:
        """Take up what `save` wrote; the batches that were read are drawn again and skipped."""
        state = torch.load(file)
        self.model.load_state_dict(state["model"])
        self.to_meaning.load_state_dict(state["to_meaning"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        while self.read < state["read"]:
            self.read += next(self.batches)[0].numel()
