"""What notebook 04 says under its outputs is what its stored outputs show."""

import re

import pytest
import rules
from nbformat import NotebookNode
from rules import said


@pytest.fixture(scope="module")
def notebook() -> NotebookNode:
    return rules.read_notebook("04")


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]


def test_the_mask_by_hand_is_the_helpers_and_covers_a_tenth(notebook):
    shown = said(notebook, "by_helper = encode_samples(")
    rows, share = re.search(r"^(\d+) 行，共.*占 ([\d.]+)%", shown, re.MULTILINE).groups()
    assert 5 < float(share) < 15
    assert f"{rows} 行和 helpers.finetune.encode_samples 的结果逐个 token 相同" in shown


def test_a_shared_persona_saves_half_of_the_tokens_and_changes_no_loss(notebook):
    found = re.findall(r"：(\d+) 个 token，loss ([\d.]+)", said(notebook, '"共用人设 share_prefix": share_prefix'))
    (padded, alone), (shared, together) = [(int(tokens), float(loss)) for tokens, loss in found]
    assert shared < padded / 2
    assert together == pytest.approx(alone, abs=5e-6)


def test_b_is_zero_at_first_and_two_zeros_learn_nothing(notebook):
    shown = said(notebook, 'for start in ["A 随机，B 是 0"')
    assert "输出的最大差别： 0.0" in shown
    assert re.search(r"A 随机，B 是 0：A 的梯度最大 0\.000，B 的梯度最大 0\.[1-9]", shown)
    assert "A、B 都是 0：A 的梯度最大 0.000，B 的梯度最大 0.000" in shown


def test_sixteen_rows_are_learnt_by_heart(notebook):
    line = re.search(r"训练 loss 最后.*", said(notebook, 'f"{OUTPUT_DIR}/overfit"'))[0]
    _, first, lowest, last = numbers(line)
    assert lowest < first and lowest < last


def test_replay_keeps_the_others_better_at_no_cost(notebook):
    found = re.findall(r"留出集困惑度 ([\d.]+)；其他角色 ([\d.]+) -> ([\d.]+)", said(notebook, "runs, results, others"))
    (own_alone, _, others_alone), (own, _, others) = [tuple(map(float, row)) for row in found]
    assert others < others_alone
    assert own < 1.1 * own_alone


def test_tuning_brings_the_voice(notebook):
    shown = said(notebook, "counts = panel.counts()")
    before, after = map(float, re.search(r"留出集困惑度 ([\d.]+) -> ([\d.]+)", shown).groups())
    assert after < before / 2
    _, base, tuned = numbers(re.search(r"有角色的词.*", shown)[0])
    assert tuned > base


def test_loaded_and_merged_it_says_the_same(notebook):
    replies = [line.split(maxsplit=1)[1] for line in said(notebook, 'replies["重新加载"]').splitlines()]
    assert len(replies) == 3 and len(set(replies)) == 1
