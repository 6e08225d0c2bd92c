"""How long until the first line of one's own code, or of the command line's help?

Measured: seconds of a fresh process, in alternation: Python that imports from transformers the classes that this project
builds on, Python that imports helpers, and `python -m helpers --help`. Printed: medians, and what helpers adds.

    python benchmarks/startup.py
    python benchmarks/startup.py --repetitions 21
"""

import statistics
import subprocess
import sys
import time
from typing import Annotated

import typer
from support.report import JsonFile, Quick, publish
from support.rounds import ROUNDS, Ratio, in_turns

CLASSES = "AutoConfig, AutoModelForCausalLM, AutoTokenizer, GlmForCausalLM, TokenizersBackend"
COMMANDS = {
    "transformers": ("-c", f"from transformers import {CLASSES}"),
    "helpers": ("-c", "import helpers"),
    "--help": ("-m", "helpers", "--help"),
}
IMPORT_BOUND, HELP_BOUND = 0.3, 1.0  # seconds: helpers beyond transformers; the help


def main(
    repetitions: Annotated[int, typer.Option(min=ROUNDS)] = 11,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    """Print the seconds of each."""
    repetitions = ROUNDS if quick else repetitions
    commands = {name: lambda _, command=command: seconds(command) for name, command in COMMANDS.items()}
    measured = in_turns(commands, range(repetitions + 1), warm_up=True)  # the files come from the disk only once
    median = {name: statistics.median(values) for name, values in measured.items()}
    added = statistics.median(h - t for h, t in zip(measured["helpers"], measured["transformers"]))
    publish(
        "import helpers 和 --help 要等多久？How long do `import helpers` and `--help` take?",
        ["what", "seconds", "bound"],
        [
            ["import transformers' classes", f"{median['transformers']:.2f}", ""],
            ["import helpers", f"{median['helpers']:.2f}", ""],
            ["helpers beyond transformers", f"{added:.2f}", f"{IMPORT_BOUND}"],
            ["python -m helpers --help", f"{median['--help']:.2f}", f"{HELP_BOUND}"],
        ],
        ratios={
            "import helpers, against transformers alone": Ratio.of(measured["transformers"], measured["helpers"]),
            "--help, against its bound": Ratio.of([HELP_BOUND] * repetitions, measured["--help"]),
        },
        setting=f"medians of {repetitions} fresh processes",
        json_file=json_file,
    )


def seconds(command: tuple[str, ...]) -> float:
    """How long Python takes for `command`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
