"""The benchmarks' common form, what becomes of their figures, and of a script that fails. The figures themselves: make bench."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

PROJECT = Path(__file__).parents[2]
BENCHMARKS = PROJECT / "benchmarks"
RUN_ALL = BENCHMARKS / "run_all.py"
SCRIPTS = sorted(path for path in BENCHMARKS.glob("*.py") if path != RUN_ALL)

PUBLISHES = """
from pathlib import Path
from typing import Annotated
import typer
from support.report import JsonFile, Quick, publish
from support.rounds import Ratio

def main(quick: Quick = False, json_file: JsonFile = None) -> None:
    assert quick
    publish(
        "问题 question?", ["what", "a|b"], [["[one]", "1 s"]], setting="short",
        ratios={"ours 比 theirs": Ratio(2.5, 2.0, 3.0), "one 比 other": Ratio(1.1, 0.9, 1.2)},
        json_file=json_file, chart={"x": "turn", "y": "seconds", "lines": {"ours": [1.0, 2.0]}},
    )

typer.run(main)
"""
NOT_RUN = "not run: needs no_such_package, see requirements-cluster.txt"
FAILS = "import sys; sys.exit('no such model')"


@pytest.fixture(scope="module", autouse=True)
def support():
    """Lets the scripts find what they share, as they do when they are run."""
    sys.path.append(str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def table(support):
    """benchmarks/support/figures_table.py as a module."""
    return importlib.import_module("support.figures_table")


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder of small benchmarks, of which one fails and one lacks its package, after all of it was run."""
    folder = tmp_path_factory.mktemp("project") / "benchmarks"
    shutil.copytree(BENCHMARKS / "support", folder / "support", ignore=shutil.ignore_patterns("__pycache__"))
    source = RUN_ALL.read_text(encoding="utf-8")
    assert '"ray"' in source
    (folder / "run_all.py").write_text(source.replace('"ray"', '"no_such_package"'), encoding="utf-8")
    (folder / "cluster.py").write_text(FAILS, encoding="utf-8")
    (folder / "a_fails.py").write_text(FAILS, encoding="utf-8")
    (folder / "b_works.py").write_text(PUBLISHES, encoding="utf-8")
    begin, end = (line for line in readme().splitlines() if line.startswith("<!--"))
    (folder / "README.md").write_text(f"before\n{begin}\nold\n{end}\nafter\n", encoding="utf-8")
    (folder / "results" / "quick").mkdir(parents=True)
    (folder / "results" / "quick" / "a_fails.json").write_text('{"of": "an earlier run"}', encoding="utf-8")
    command = [sys.executable, str(folder / "run_all.py")]
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "BENCHMARK_LOAD": "1000"}
    return folder, subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def rounds(support):
    """benchmarks/support/rounds.py as a module."""
    return importlib.import_module("support.rounds")


def test_a_ratio_is_of_rounds_and_has_its_spread(rounds) -> None:
    ratio = rounds.Ratio.of([2.0, 9.0, 4.0, 8.0], [1.0, 3.0, 1.0, 4.0])
    assert (ratio.median, ratio.lowest, ratio.highest) == (2.5, 2.0, 4.0)
    assert (ratio.verdict("above 1"), ratio.spread) == ("2.50x", "2.00 – 4.00")
    with pytest.raises(ValueError, match="2 rounds"):
        rounds.Ratio.of([1.0, 1.0], [1.0, 1.0])
    with pytest.raises(ValueError):
        rounds.Ratio.of([1.0] * 3, [1.0] * 4)


@pytest.mark.parametrize(
    ("lowest", "highest", "better", "verdict"),
    [
        (0.8, 1.5, "above 1", "no difference seen"),
        (0.8, 1.5, "below 1", "no difference seen"),
        (1.0, 1.5, "above 1", "no difference seen"),
        (1.01, 1.5, "above 1", "1.20x"),
        (0.5, 0.9, "above 1", "1.20x"),
        (0.8, 1.5, "at 1", "1.20x"),
        (0.8, 1.5, "neither", "1.20x"),
    ],
)
def test_rounds_that_disagree_decide_nothing(rounds, lowest, highest, better, verdict) -> None:
    assert rounds.Ratio(1.2, lowest, highest).verdict(better) == verdict


def test_sides_take_turns_in_going_first(rounds) -> None:
    order = []
    sides = {name: lambda item, name=name: order.append(name) or f"{name}{item}" for name in "abc"}
    assert rounds.in_turns(sides, "123") == {side: [f"{side}{item}" for item in "123"] for side in "abc"}
    assert "".join(order) == "abccbaabc"
    assert rounds.in_turns(sides, "12", warm_up=True) == {"a": ["a2"], "b": ["b2"], "c": ["c2"]}


def test_lora_rounds_have_long_and_short_rows(support) -> None:
    lora = importlib.import_module("lora")
    rows = [{"input_ids": [0] * length} for length in range(1, 402)]
    chosen = lora.representative(rows, 5)
    assert [len(batch) for batch in chosen] == [lora.BATCH] * 5
    lengths = [len(row["input_ids"]) for batch in chosen for row in batch]
    assert sum(lengths) / len(lengths) == pytest.approx(201, abs=3)
    assert min(lengths) < 50 and max(lengths) > 350


@pytest.mark.slow
def test_a_token_of_the_6bs_shape_costs_no_less_than_reading_its_weights(tmp_path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, BENCHMARKS / "six_b_cpu.py", "--quick", "--folder", tmp_path, "--json", file]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert list(tmp_path.iterdir()) == [file], "the checkpoint was not deleted"
    figures = json.loads(file.read_text(encoding="utf-8"))
    (ratio,) = figures["ratios"].values()
    assert 0.05 < ratio["median"] < 1.1
    assert dict(figures["rows"])["weights"] == "1.88 GB of torch.bfloat16"


@pytest.mark.parametrize(
    ("average", "note"), [(2.6, "loaded at start: 2.6 processes on 2 cores"), (2.0, ""), (0.1, "")]
)
def test_a_machine_that_was_busy_is_named_so(rounds, average, note) -> None:
    assert rounds.load_note(average, 2) == note


def readme() -> str:
    return (BENCHMARKS / "README.md").read_text(encoding="utf-8")


def options(script: Path) -> set[str]:
    """Names of the command's options."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app = typer.Typer()
    app.command()(module.main)
    return {option for parameter in typer.main.get_command(app).params for option in parameter.opts}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_every_script_is_listed_and_has_the_common_form(script: Path) -> None:
    assert f"[`{script.name}`]({script.name}) | " in readme(), "benchmarks/README.md does not say what it asks"
    assert options(script) >= {"--quick", "--json"}
    assert "publish(" in script.read_text(encoding="utf-8")


def test_the_table_is_what_the_committed_figures_give(table) -> None:
    results = table.read_results(BENCHMARKS)
    assert results, "no figures in benchmarks/results/quick: make bench"
    assert readme() == table.with_part(readme(), table.render(BENCHMARKS)), "benchmarks/run_all.py --redraw"
    charts = re.findall(r"\]\((results/quick/[^)]+\.png)\)", readme())
    assert "results/quick/ratios.png" in charts
    for chart in charts:
        assert (BENCHMARKS / chart).read_bytes().startswith(b"\x89PNG")
    assert results.keys() <= {script.stem for script in SCRIPTS}, "figures of a script that is gone"


def test_the_others_run_after_a_failure_which_is_reported(ran) -> None:
    folder, done = ran
    assert done.returncode == 1
    assert "[failed benchmarks]：a_fails.py: failed: exit code 1" in done.stderr
    assert "no such model" in done.stderr
    runs = json.loads((folder / "results" / "quick" / "run_all.json").read_text())
    assert {name: run["status"] for name, run in runs.items()} == {
        "a_fails": "failed: exit code 1",
        "b_works": "ok",
        "cluster": NOT_RUN,
    }
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "| [`a_fails.py`](a_fails.py) | **failed: exit code 1** |" in text
    assert f"| [`cluster.py`](cluster.py) | **{NOT_RUN}** |" in text
    assert not (folder / "results" / "quick" / "a_fails.json").exists(), "figures of an earlier run would stay"


def test_what_is_published_comes_out_as_json_and_as_a_table(ran) -> None:
    folder, done = ran
    result = json.loads((folder / "results" / "quick" / "b_works.json").read_text(encoding="utf-8"))
    assert (result["question"], result["rows"], result["ratios"]) == (
        "问题 question?",
        [["[one]", "1 s"]],
        {
            "ours 比 theirs": {"median": 2.5, "lowest": 2.0, "highest": 3.0},
            "one 比 other": {"median": 1.1, "lowest": 0.9, "highest": 1.2},
        },
    )
    assert result["threads"] == 1 and result["device"]["name"] and result["versions"]["torch"] and result["time_utc"]
    assert "ours 比 theirs: 2.50x (2.00 – 3.00)" in done.stdout and "[one]" in done.stdout
    assert "one 比 other: no difference seen (0.90 – 1.20)" in done.stdout
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    busy = f"loaded at start: 1000.0 processes on {os.cpu_count()} cores"
    assert f"| [`b_works.py`](b_works.py) ({busy}) | ours 比 theirs | 2.50x | 2.00 – 3.00 | > 1 |" in text
    assert "|  | one 比 other | no difference seen | 0.90 – 1.20 | > 1 |" in text
    assert f"short; {busy}" in text
    assert "| what | a\\|b |\n|---|---|\n| [one] | 1 s |" in text
    assert result["device"]["name"] in text and result["time_utc"][:10] in text
    for chart in ("ratios", "b_works"):
        assert (folder / "results" / "quick" / f"{chart}.png").exists()
