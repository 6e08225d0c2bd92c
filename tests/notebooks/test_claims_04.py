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


def test_the_loss_by_hand_is_the_models(notebook):
    by_hand, models = re.search(
        r"平均是 ([\d.]+)，模型自己算的 loss 是 ([\d.]+)", said(notebook, "def chances(model)")
    ).groups()
    assert float(by_hand) == pytest.approx(float(models), abs=2e-4)


def test_a_new_layer_changes_nothing_and_learns_only_from_one_zero_at_the_right_rate(notebook):
    assert "输出的最大差别： 0.0" in said(notebook, "class LoRALinear")
    line = r"^(.*)，第 (\d+) 步：loss ([\d.]+)，最大的梯度 A ([\d.]+)，B ([\d.]+)$"
    found = re.findall(line, said(notebook, "optimizer = torch.optim.AdamW"), re.MULTILINE)
    at = {(name, int(step)): (float(loss), float(a), float(b)) for name, step, loss, a, b in found}
    assert at["照规矩", 0][1] == 0 < min(at["照规矩", 0][2], at["照规矩", 1][1])
    assert at["照规矩", 100][0] < 0.01
    assert {at["A 也从 0 开始", step][1:] for step in (0, 1, 100)} == {(0, 0)}
    assert at["学习率太小", 100][0] > 0.9 * at["学习率太小", 0][0]
    assert (
        at["学习率太大", 1][0] > 10 * at["学习率太大", 0][0] and at["学习率太大", 100][0] > 0.9 * at["学习率太大", 0][0]
    )


def test_pefts_layer_computes_the_formula(notebook):
    largest, difference = re.search(r"输出最大 ([\d.]+)，.*差别 ([\d.]+)", said(notebook, "by_hand, by_peft")).groups()
    assert float(difference) < 1e-5 * float(largest)


def test_a_shared_persona_saves_half_of_the_tokens_and_changes_no_loss(notebook):
    found = re.findall(r"：(\d+) 个 token，loss ([\d.]+)", said(notebook, '"人设只算一次": share_prefix'))
    (padded, alone), (shared, together) = [(int(tokens), float(loss)) for tokens, loss in found]
    assert shared < padded / 2
    assert together == pytest.approx(alone, abs=9e-6)


def test_eight_rows_are_learnt_by_heart(notebook):
    shown = said(notebook, "trainer.train()")
    notes = re.findall(r"\[(学过|没见过)\].*\n.*\n  模型：.*（(.*)）$", shown, re.MULTILINE)
    known = [note == "一字不差" for seen, note in notes if seen == "学过"]
    new = [note == "一字不差" for seen, note in notes if seen == "没见过"]
    assert known == [True] * 3 and new == [False] * 3
    first, last, start, lowest, held_out = numbers(re.search(r"训练 loss .*", shown)[0].replace("->", ""))
    assert last < 0.1 * first
    assert lowest < 0.95 * min(start, held_out)


def test_tuning_lowers_the_held_out_perplexity(notebook):
    table = said(notebook, '"困惑度：自己的留出集"')
    before, alone, mixed = (
        numbers(re.search(rf"^{name} +.*", table, re.MULTILINE)[0])[0] for name in ("微调前", "no_replay", "lora")
    )
    assert max(alone, mixed) < before


def test_tuning_brings_the_voice(notebook):
    _, base, tuned = numbers(re.search(r"有角色的词的句数.*", said(notebook, "counts = panel.counts()"))[0])
    assert tuned > base


def test_loaded_and_merged_it_says_the_same(notebook):
    merge, *lines = said(notebook, 'replies["重新加载"]').splitlines()
    changed, difference = re.search(r"变了 ([\d.]+).*差 (\S+)$", merge).groups()
    assert 0 <= float(difference) < 0.01 * float(changed)
    replies = [line.split(maxsplit=1)[1] for line in lines]
    assert len(replies) == 3 and len(set(replies)) == 1
