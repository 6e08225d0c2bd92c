"""The figures of `make bench` as a part of benchmarks/README.md: tables, and charts beside the figures.

Reads what `publish` wrote into results/quick/, one JSON file a script, and what run_all.py wrote about the run. Nothing is
measured here, so the part can be drawn again at any time and gives the same text.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402 - the backend comes first: there is no screen
from support.rounds import Ratio, load_note  # noqa: E402

BEGIN, END = "<!-- figures of make bench: begin -->", "<!-- figures of make bench: end -->"
RUN = "run_all.json"
QUICK = Path("results") / "quick"
RATIO_CHART = "ratios.png"
PANELS = {
    "above 1": "against the other way or a bound: above 1 is better",
    "below 1": "against the least that is needed: smaller is better",
    "at 1": "estimate / truth: 1 is exact",
}
GOOD = {"above 1": "> 1", "below 1": "< 1", "at 1": "= 1", "neither": ""}


def redraw(folder: Path) -> None:
    """Draw the charts in `folder`/results/quick anew, and the part of `folder`/README.md between the two comments."""
    results = read_results(folder)
    for old in (folder / QUICK).glob("*.png"):
        old.unlink()
    draw_ratios(results, folder / QUICK / RATIO_CHART)
    for name, result in results.items():
        if result["chart"]:
            draw_lines(result["chart"], name, folder / QUICK / f"{name}.png")
    readme = folder / "README.md"
    readme.write_text(with_part(readme.read_text(encoding="utf-8"), render(folder)), encoding="utf-8")


def with_part(text: str, part: str) -> str:
    """`text` with `part` between the two comments; ValueError if they are not there."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{part}{END}{after}"


def read_results(folder: Path) -> dict[str, dict]:
    """Figures of every script that has some, by its name."""
    files = sorted((folder / QUICK).glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files if file.name != RUN}


def render(folder: Path) -> str:
    """The part as Markdown."""
    results = read_results(folder)
    runs = json.loads((folder / QUICK / RUN).read_text(encoding="utf-8"))
    lines = [setting(results, runs), "", *ratio_table(results, runs), ""]
    charts = [RATIO_CHART, *(f"{name}.png" for name, result in results.items() if result["chart"])]
    lines += [f"![{Path(chart).stem}]({QUICK.as_posix()}/{chart})\n" for chart in charts if results]
    for name, result in results.items():
        lines += details(name, result, runs.get(name, {}))
    return "\n".join(lines) + "\n"


def setting(results: dict[str, dict], runs: dict[str, dict]) -> str:
    """When and on what; several of each if the scripts did not run together."""
    minutes = sum(run["seconds"] for run in runs.values()) / 60
    devices = {describe(result) for result in results.values()}
    days = sorted({result["time_utc"][:10] for result in results.values()})
    when = " – ".join(dict.fromkeys([days[0], days[-1]])) if days else ""
    return f"{'; '.join(sorted(devices))}. {when}. `--quick`, {minutes:.1f} min."


def describe(result: dict) -> str:
    """The device, its cores and the versions that matter."""
    device, versions = result["device"], result["versions"]
    cores = f", {device['cores']} cores" if "cores" in device else ""
    used = "" if result["threads"] == device.get("cores") else f", {result['threads']} torch threads"
    software = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "transformers"))
    return f"{device['name']}{cores}{used}, {device['memory_gib']} GiB; {software}"


def ratio_table(results: dict[str, dict], runs: dict[str, dict]) -> list[str]:
    """Every ratio, a row each; scripts that failed or were not run say so, and those on a busy machine."""
    lines = ["| script | compared | ratio | lowest – highest | good |", "|---|---|---:|---:|---|"]
    for name in sorted(results.keys() | runs.keys()):
        link = f"[`{name}.py`]({name}.py)"
        if (status := runs.get(name, {}).get("status", "ok")) != "ok":
            lines.append(row([link, f"**{status}**", "", "", ""]))
        result = results.get(name, {"ratios": {}})
        if result["ratios"] and (note := load_note(**result["load"])):
            link += f" ({note})"
        for compared, figures in result["ratios"].items():
            ratio = Ratio(**figures)
            lines.append(row([link, compared, ratio.verdict(result["better"]), ratio.spread, GOOD[result["better"]]]))
            link = ""
    return lines


def details(name: str, result: dict, run: dict) -> list[str]:
    """The table that a script printed, folded."""
    took = f" ({run['seconds']:.0f} s)" if run else ""
    summary = f"<details><summary><code>{name}.py</code>{took}: {result['question']}</summary>"
    table = [row(result["columns"]), "|---" * len(result["columns"]) + "|", *map(row, result["rows"])]
    about = "; ".join(filter(None, [result["setting"], load_note(**result["load"])]))
    return [summary, "", about, "", *table, "", "</details>", ""]


def row(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# --- charts


def draw_ratios(results: dict[str, dict], file: Path) -> None:
    """All ratios as bars from 1, in one panel for each sense in which they are good."""
    panels = {title: bars(results, better) for better, title in PANELS.items()}
    panels = {title: found for title, found in panels.items() if found}
    if not panels:
        return
    heights = [len(found) + 2 for found in panels.values()]
    size = (10, 0.26 * sum(heights) + 0.5)
    figure, axes = plt.subplots(len(panels), figsize=size, height_ratios=heights, squeeze=False, layout="constrained")
    for axis, (title, found) in zip(axes[:, 0], panels.items()):
        names, ratios = zip(*found)
        spread = [[r.median - r.lowest for r in ratios], [r.highest - r.median for r in ratios]]
        axis.barh(names, [ratio.median - 1 for ratio in ratios], left=1, color="#4878a8", xerr=spread, ecolor="#888888")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        lowest, highest = min(ratio.lowest for ratio in ratios), max(ratio.highest for ratio in ratios)
        axis.set_xlim(min(0.5, lowest) / 1.3, max(2, highest) * 1.6)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        axis.set_title(title, loc="left", fontsize=10)
        for position, ratio in enumerate(ratios):
            end = max(ratio.highest, 1) * 1.03
            axis.text(end, position, f"{ratio.median:.2f}x", va="center", fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def bars(results: dict[str, dict], better: str) -> list[tuple[str, Ratio]]:
    """(label, ratio) of the scripts whose ratios are good in that sense."""
    return [
        (english(f"{name}: {compared}"), Ratio(**ratio))
        for name, result in results.items()
        if result["better"] == better
        for compared, ratio in result["ratios"].items()
    ]


def draw_lines(chart: dict, title: str, file: Path) -> None:
    """Curves over 1, 2, 3, ..."""
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for name, values in chart["lines"].items():
        axis.plot(range(1, len(values) + 1), values, label=english(name))
    axis.set_xlabel(english(chart["x"]))
    axis.set_ylabel(english(chart["y"]))
    axis.set_ylim(bottom=0)
    axis.set_title(f"{title}.py", loc="left", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def english(text: str) -> str:
    """`text` without characters that the chart's font may lack."""
    return text.encode("ascii", "ignore").decode().strip()
