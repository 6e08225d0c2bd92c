"""How training is watched: one line a logging step in a terminal, a curve that grows in a notebook."""

import math
import time

from transformers import TrainerCallback


class LogLines(TrainerCallback):
    """Prints one line for every logging step and every evaluation."""

    def on_log(self, args, state, control, logs, **kwargs):
        if not state.is_world_process_zero:
            return
        where = f"step {state.global_step}/{state.max_steps}  epoch {state.epoch or 0:.2f}"
        if "loss" in logs:
            print(f"{where}  loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}", flush=True)
        elif "eval_loss" in logs:
            loss = logs["eval_loss"]
            print(f"{where}  held-out loss {loss:.4f}  perplexity {math.exp(min(loss, 700)):.2f}", flush=True)


class LiveCurve(TrainerCallback):
    """Draws training and held-out loss in a notebook cell and updates the picture, at most every three seconds."""

    def __init__(self):
        self.shown, self.drawn_at = None, 0.0

    def on_log(self, args, state, control, at_once=False, **kwargs):
        if not state.is_world_process_zero or (not at_once and time.monotonic() - self.drawn_at < 3):
            return
        import matplotlib.pyplot as plt
        from IPython.display import display

        figure = plot_losses(state.log_history)
        if self.shown is None:
            self.shown = display(figure, display_id=True)
        else:
            self.shown.update(figure)
        plt.close(figure)  # or the notebook would show it once more
        self.drawn_at = time.monotonic()

    def on_train_end(self, args, state, control, **kwargs):
        self.on_log(args, state, control, at_once=True)


def plot_losses(log_history: list[dict]):
    """A figure of the losses that the Trainer logged, over the steps."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "held-out", "o-")):
        points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
        if points:
            axis.plot(*zip(*points), style, label=label)
    axis.set(xlabel="step", ylabel="loss (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure
