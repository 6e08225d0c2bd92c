"""What notebook 02 says under its outputs is what its stored outputs show."""

import ast
import re

import pytest
import rules
from nbformat import NotebookNode
from rules import said


@pytest.fixture(scope="module")
def notebook() -> NotebookNode:
    return rules.read_notebook("02")


def figures(text: str) -> dict[str, dict[str, float]]:
    """Lines such as "16 users {'first words, s': 0.4}"; a later line with the same name replaces an earlier one."""
    return {name.strip(): ast.literal_eval(row) for name, row in re.findall(r"^(.*?)(\{.*\})$", text, re.MULTILINE)}


def test_only_the_blocking_server_keeps_health_waiting(notebook):
    health = figures(said(notebook, 'health["def, 1 user"]'))
    blocked, free = health["async def, 16 users"], health["def, 16 users"]
    assert blocked["slowest /health, s"] > 0.8 * blocked["all replies, s"]
    assert free["slowest /health, s"] < 0.2 * blocked["slowest /health, s"]
    assert free["all replies, s"] > 0.7 * blocked["all replies, s"]


def test_the_server_by_hand_stays_flat_and_the_batching_one_rises(notebook):
    hand, batched = (figures(said(notebook, f'await measure("{name}"')) for name in ("by hand", "batched"))
    speed = "characters / s"
    assert hand["16 users"][speed] < 2 * hand["1 users"][speed]
    assert batched["16 users"][speed] > 2 * batched["1 users"][speed]
    assert all(batched[users]["first words, s"] < hand[users]["first words, s"] for users in hand)
    assert "两边写的字相同： True" in said(notebook, 'await measure("batched"')


def test_a_known_beginning_is_not_computed_again(notebook):
    first, second = map(float, re.findall(r"等了 ([\d.]+) 秒", said(notebook, "past = ")))
    assert second < first / 2


def test_what_is_refused_and_what_is_the_same(notebook):
    shown = said(notebook, "statuses = []")
    assert shown.count("400 ") == 3
    assert "相同：  True" in shown
    assert "Method Not Allowed" in said(notebook, "naive = Server(")


def test_a_laptop_holds_the_quantised_model(notebook):
    shown = said(notebook, "helpers.estimate(")
    assert re.findall(r"(\S+) chat：.*合计 GiB ([\d.]+)，8 GiB 显存 (够|不够)", shown) == [
        ("bf16", "11.87", "不够"),
        ("q8_0", "6.42", "够"),
        ("q4_k_m", "4.04", "够"),
    ]
    text = rules.markdown(notebook)
    assert "bf16 要 11.87 GiB" in text and "q8_0 要 6.42 GiB" in text and "q4_k_m 要 4.04 GiB" in text
