"""What notebook 01 says under its outputs is what its stored outputs show."""

import re

import pandas
import pytest
import rules
from nbformat import NotebookNode
from rules import said

import helpers


@pytest.fixture(scope="module")
def notebook() -> NotebookNode:
    return rules.read_notebook("01")


def table(notebook: NotebookNode, code: str) -> pandas.DataFrame:
    """The table shown by the one cell with `code` in it; texts as they stand there."""
    rows = re.findall(r"<tr.*?</tr>", rules.the_cell(notebook, code).outputs[-1].data["text/html"], re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    return pandas.DataFrame([row[1:] for row in cells[1:]], index=[row[0] for row in cells[1:]], columns=cells[0][1:])


def test_the_arithmetic_of_the_text_is_that_of_the_estimate(notebook):
    text = rules.markdown(notebook)
    plan = helpers.estimate("chat", tokens=4096)
    for name in ("权重", "KV cache", "激活"):
        size = plan.parts[name]
        line = next(line for line in text.splitlines() if line.startswith(name))
        assert re.search(rf"= +{size / 1e9:.2f} GB = +{size / 2**30:.2f} GiB$", line), line
    assert f"{plan.gib:.2f} GiB" in text
    shown = table(notebook, "helpers.estimate(")
    assert shown["合计 GiB"].iloc[0] == f"{plan.gib:.2f}"
    assert 16 < float(shown["合计 GiB"].iloc[1]) < 17
    assert set(shown["24 GiB 显存"]) == {"够"}


def test_the_library_the_helper_and_the_loop_by_hand_agree(notebook):
    assert said(notebook, "by_hand = ").rstrip().endswith("True")
    assert said(notebook, "model.generate(").count("True") == 2
    assert said(notebook, "made.append(").rstrip().endswith(r"'\n']")


def test_the_cache_gives_the_same_tokens_sooner_and_without_a_stop_the_model_goes_on(notebook):
    shown = said(notebook, "slow_ids, slow = ")
    slow, fast = map(float, re.findall(r"缓存 ([\d.]+) 秒", shown))
    assert "token 相同：True" in shown
    assert fast < slow / 2
    assert re.search(r"(\\n)+\w", shown), "text goes on after the newline; it is shown as a repr"


def test_quantisation_is_smaller_slower_and_hardly_worse_on_a_cpu(notebook):
    shown = table(notebook, "quantization=name").drop(columns="回复").astype(float)
    nf4, int8, plain = (shown.loc[name] for name in ("nf4", "int8", "不量化"))
    assert nf4["权重 MiB"] < int8["权重 MiB"] < plain["权重 MiB"]
    assert int8["权重 MiB"] / plain["权重 MiB"] == pytest.approx(1 - 0.42, abs=0.01)
    assert min(nf4["毫秒/token"], int8["毫秒/token"]) > plain["毫秒/token"]
    assert shown["困惑度"].max() < 1.1 * shown["困惑度"].min()
