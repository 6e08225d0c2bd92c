"""Run every benchmark with --quick, one after another, and draw its part of benchmarks/README.md anew.

Each runs in a process of its own and writes results/quick/NAME.json; if one fails or takes longer than 10 minutes the
others still run, the table says so, and the exit code is 1. One whose optional package is missing is not run, which the
table says too. What a script measured before is deleted first: figures that
stand in the table are of the last run.

    python benchmarks/run_all.py                   # what `make bench` does: about 10 minutes on two quiet cores
    python benchmarks/run_all.py startup lora      # only these
    python benchmarks/run_all.py --redraw          # only tables and charts, from the figures that are there
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from support.figures_table import QUICK, RUN, redraw
from support.report import LOAD, LOAD_VARIABLE

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / QUICK
TIMEOUT_SECONDS = 600  # a slow machine; a quiet one needs less for all of them
NEEDS = {
    "cluster": ("ray", "requirements-cluster.txt"),
    "laptop": ("xllamacpp", "requirements-dev.txt"),
}  # optional packages, and where they are listed
SCRIPTS = {path.stem: path for path in sorted(FOLDER.glob("*.py")) if path.name != Path(__file__).name}


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Scripts, without .py; all if none is named.")] = None,
    redraw_only: Annotated[bool, typer.Option("--redraw", help="Measure nothing.")] = False,
) -> None:
    """Run the benchmarks and draw their figures."""
    if unknown := sorted(set(names or ()) - SCRIPTS.keys()):
        raise typer.BadParameter(f"{', '.join(unknown)}: unknown, choose from {', '.join(SCRIPTS)}")
    runs = {} if redraw_only else run_scripts(names or list(SCRIPTS))
    redraw(FOLDER)
    failed = [f"{name}.py: {run['status']}" for name, run in runs.items() if run["status"].startswith("failed")]
    if failed:
        sys.exit("失败的脚本 [failed benchmarks]：" + "；".join(failed))


def run_scripts(names: list[str]) -> dict[str, dict]:
    """Run these scripts; what became of each is also kept in results/quick, after every one."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / RUN
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    kept = {name: run for name, run in kept.items() if name in SCRIPTS}  # a script that is gone leaves no row
    runs = {}
    for name in names:
        print(f"== {name}.py", flush=True)
        runs[name] = run_script(SCRIPTS[name], RESULTS / f"{name}.json")
        print(f"== {name}.py: {runs[name]['status']}, {runs[name]['seconds']} s\n", flush=True)
        file.write_text(json.dumps(dict(sorted((kept | runs).items())), indent=2) + "\n", encoding="utf-8")
    return runs


def run_script(script: Path, figures: Path) -> dict:
    """Run one script; returns its status ("ok", "failed: ..." or "not run: ...") and the seconds it took."""
    figures.unlink(missing_ok=True)
    package, listed = NEEDS.get(script.stem, (None, None))
    if package and importlib.util.find_spec(package) is None:
        return {"status": f"not run: needs {package}, see {listed}", "seconds": 0.0}
    start = time.perf_counter()
    code = run([sys.executable, str(script), "--quick", "--json", str(figures)])
    status = (
        f"failed: longer than {TIMEOUT_SECONDS} s" if code is None else f"failed: exit code {code}" if code else "ok"
    )
    if status == "ok" and not figures.exists():
        status = "failed: no figures written"
    return {"status": status, "seconds": round(time.perf_counter() - start, 1)}


def run(command: list[str]) -> int | None:
    """The exit code, or None after the time is over; then, and on Ctrl-C, what it started ends with it."""
    with subprocess.Popen(command, start_new_session=True, env=os.environ | {LOAD_VARIABLE: str(LOAD)}) as process:
        try:
            return process.wait(TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    typer.run(main)
