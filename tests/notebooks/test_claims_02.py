"""What notebook 02 says under its outputs is what its stored outputs show."""

import json
import re

import pytest
import rules
from nbformat import NotebookNode
from rules import said

from helpers.serving.schemas import LessonRequest


@pytest.fixture(scope="module")
def notebook() -> NotebookNode:
    return rules.read_notebook("02")


def rows(text: str, pattern: str) -> dict[int, list[float]]:
    """The numbers in every line that fits: by the first of them, a count; a later line replaces an earlier one."""
    return {int(count): [float(number) for number in numbers] for count, *numbers in re.findall(pattern, text)}


def test_one_word_frees_health_and_makes_nothing_faster(notebook):
    pattern = r"(\d+) 人：全部答完 ([\d.]+) 秒，最慢的一次 /health ([\d.]+) 秒"
    blocked = rows(said(notebook, 'slowest_health("async def"'), pattern)
    free = rows(said(notebook, 'slowest_health("def"'), pattern)
    assert blocked[1][1] < blocked[16][1]
    assert blocked[16][1] > 0.8 * blocked[16][0]
    assert free[16][1] < 0.4 * blocked[16][1]
    assert free[16][0] > 0.7 * blocked[16][0]


def test_the_first_words_come_long_before_the_last(notebook):
    shown = said(notebook, "events.append(line)")
    seconds = [float(one) for one in re.findall(r"^([\d.]+) 秒  data: ", shown, re.MULTILINE)]
    assert seconds == sorted(seconds) and len(seconds) > 4
    assert seconds[0] < seconds[-1] / 2
    assert shown.rstrip().endswith("data: [DONE]")


def test_a_step_of_sixteen_rows_costs_far_less_than_sixteen(notebook):
    steps = rows(said(notebook, "for rows in"), r"(\d+) 行：一步 +([\d.]+) 毫秒，每秒一共 +(\d+) 个 token")
    assert steps[16][0] < 8 * steps[1][0]
    assert steps[16][1] > 2 * steps[1][1]


def test_the_server_by_hand_stays_flat_and_the_batching_one_rises(notebook):
    pattern = r"(\d+) 人：每秒一共 +([\d.]+) 字，第一个字 ([\d.]+) 秒"
    hand, batched = (rows(said(notebook, f'await measure("{name}"'), pattern) for name in ("by hand", "batched"))
    assert hand[16][0] < 2 * hand[1][0]
    assert batched[16][0] > 2 * batched[1][0]
    assert all(batched[users][1] < hand[users][1] for users in hand if users >= 8)
    shown = said(notebook, 'await measure("batched"')
    assert "两边写的字相同： True" in shown
    more, less = map(float, re.findall(r"批处理是手写的 ([\d.]+) 倍", shown))
    assert less < 1 < more < 16


def test_four_characters_at_once_say_the_same_sooner(notebook):
    together, alone = map(float, re.findall(r"(?:一起|一个一个) ([\d.]+) 秒", said(notebook, "def ask(")))
    assert together < alone
    assert "字相同：True" in said(notebook, "def ask(")


def test_a_known_beginning_is_not_computed_again(notebook):
    first, second, short = map(float, re.findall(r"等了 ([\d.]+) 秒", said(notebook, "past = ")))
    assert second < first / 1.5
    assert second - short < first - second


def test_what_is_refused(notebook):
    shown = said(notebook, "def visit(")
    assert [line[:3] for line in shown.splitlines()[:5]] == ["200", "401", "400", "400", "400"]
    assert "至少是 0" in shown and "[must not be blank]" in shown and "林黛玉" in shown
    let_in, refused = map(int, re.search(r"(\d+) 人 200，(\d+) 人 429", shown).groups())
    assert let_in >= 32 and refused > 0 and let_in + refused == 64
    assert "Method Not Allowed" in said(notebook, "naive = Server(")


def test_the_curl_line_is_a_request_that_the_server_takes(notebook):
    (body,) = re.findall(
        r"^curl -X POST http://127\.0\.0\.1:6006 .* -d '(.*)'$", rules.markdown(notebook), re.MULTILINE
    )
    LessonRequest.model_validate(json.loads(body))
