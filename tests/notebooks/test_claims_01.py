"""What notebook 01 says under its outputs is what its stored outputs show."""

import re

import pytest
import rules
from nbformat import NotebookNode
from rules import said
from transformers import AutoConfig, GenerationConfig

import helpers
from helpers.inspect.estimate import RESERVE_GIB
from helpers.model.modeling import CharacterGLMConfig


@pytest.fixture(scope="module")
def notebook() -> NotebookNode:
    return rules.read_notebook("01")


def rows(notebook: NotebookNode, head: str) -> dict[str, list[str]]:
    """The table of a text cell that starts with the line `head`: cells by the first one of their row."""
    lines = rules.markdown(notebook).split(f"{head}\n")[1].split("\n\n")[0].splitlines()[1:]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in table}


def chances(notebook: NotebookNode) -> tuple[list[str], list[list[float]]]:
    """The table of step 8: the tokens, and for each setting their chances in percent."""
    output = rules.the_cell(notebook, "chances.style").outputs[-1]
    rows = re.findall(r"<tr>(.*?)</tr>", output.data["text/html"], re.DOTALL)[1:]
    tokens = [re.search(r"<th[^>]*>(.*?)</th>", row)[1] for row in rows]
    numbers = [[float(number) for number in re.findall(r">([\d.]+)%</td>", row)] for row in rows]
    return tokens, [list(column) for column in zip(*numbers, strict=True)]


def test_the_arithmetic_of_the_text_is_that_of_the_estimate(notebook):
    text = rules.markdown(notebook)
    plan = helpers.estimate("chat", tokens=4096)
    for name in ("权重", "KV cache", "激活"):
        size = plan.parts[name]
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert re.search(rf"= +{size / 1e9:.2f} GB = +{size / 2**30:.2f} GiB$", line), line
    assert f"{plan.gib:.2f} GiB" in text


def test_the_table_of_uses_is_that_of_the_estimate(notebook):
    plans = {
        "聊天，4,096 个 token": helpers.estimate("chat", tokens=4096),
        "聊天，读满 32,768 个 token": helpers.estimate("chat", tokens=32768),
        "聊天，4,096 个 token，8 位量化": helpers.estimate("chat", tokens=4096, quantization="int8"),
        "聊天，4,096 个 token，4 位量化": helpers.estimate("chat", tokens=4096, quantization="nf4"),
        "LoRA 微调，4 段 × 512 个 token": helpers.estimate("lora", batch=4, tokens=512),
    }
    wanted = {}
    for use, plan in plans.items():
        row = plan.row()
        wanted[use] = [row["权重"], row["KV cache"], row["激活"], f"{plan.gib:.2f}", f"{plan.gib + RESERVE_GIB:.2f}"]
        assert plan.gib + RESERVE_GIB < 24, "every row fits a card of 24 GB"
    assert rows(notebook, "| 6B | 权重 | KV cache | 激活 | 合计 | 加上 CUDA 自己的约 1 |") == wanted


def test_the_sizes_in_the_text_are_those_of_the_two_models(notebook):
    sizes = rows(notebook, "| | 6B | Nano | `config.json` 里的名字 |")
    large, small = CharacterGLMConfig(), AutoConfig.from_pretrained(helpers.resolve_model("nano"))
    for six, nano, name in sizes.values():
        assert [six, nano] == [f"{getattr(config, name.strip('`')):,}" for config in (large, small)]
    shapes = re.findall(r"\(1, [\d, ]+\)", said(notebook, "vectors = "))
    drawn = re.search(r"(\d+) 个编号.*换成 (\d+) 个数.*× (\d+) 层.*位置 ([\d,]+) 个分数", rules.markdown(notebook))
    tokens, width, layers, vocabulary = (int(number.replace(",", "")) for number in drawn.groups())
    assert shapes == [f"(1, {tokens})", f"(1, {tokens}, {width})", f"(1, {tokens}, {vocabulary})"]
    assert (width, layers, vocabulary) == (small.hidden_size, small.num_hidden_layers, small.vocab_size)


def test_what_nano_samples_with_is_what_its_file_says(notebook):
    chosen = GenerationConfig.from_pretrained(helpers.resolve_model("nano"))
    assert f"（temperature {chosen.temperature:g}，不惩罚重复）" in rules.markdown(notebook)
    assert chosen.repetition_penalty == 1.0


def test_the_vocabulary_cuts_as_the_text_says(notebook):
    assert all(f" {cut} " in said(notebook, "messages = ") for cut in ("歌 手", "演 员"))
    assert "<0x4D>" in said(notebook, "attack = ")
    assert "好呀" in said(notebook, "convert_ids_to_tokens(ids)") and " 你好 呀 " in said(notebook, "messages = ")


def test_nobody_can_speak_for_another(notebook):
    shown = said(notebook, "attack = ")
    assert "换行 token 4 个，应有 4 个" in shown and "[gMASK] 1 个，</s> 0 个" in shown


def test_what_comes_later_does_not_change_the_keys_before(notebook):
    shown = said(notebook, "before = model(")
    largest, difference = map(float, re.search(r"最大的数 ([\d.]+)，两次最多相差 ([\d.]+)", shown).groups())
    assert difference < 1e-5 * largest


def test_every_setting_changes_the_chances_as_the_text_says(notebook):
    tokens, columns = chances(notebook)
    plain, cold, hot, three, half, penalty = columns
    assert all(sum(column) == pytest.approx(100, abs=0.5) for column in columns)
    assert cold[0] >= plain[0] > hot[0] and hot[-1] > plain[-1]
    assert all(chance == 0 for chance in three[3:])
    kept = [before for before, after in zip(plain, half) if after]
    assert half[-1] == 0 and sum(kept[:-1]) < 50 < sum(kept) + 0.5
    for token, before, after in list(zip(tokens, plain, penalty))[:-1]:
        assert after <= before if token.endswith("*") else after >= before, token


def test_the_first_words_come_before_the_last(notebook):
    waits = re.findall(r"第一块等了 (\d+) 毫秒，整句 (\d+) 毫秒", said(notebook, "helpers.stream_chat("))
    assert len(waits) == 3 and all(int(first) < int(whole) for first, whole in waits)


def test_the_history_is_in_the_prompt(notebook):
    shown = said(notebook, "remembered = ")
    without, along = map(int, re.findall(r"历史：(\d+) 个 token", shown))
    assert along > without
    assert "写的一样： True" in shown
    assert "角色 character:" in shown and "角色 character" not in said(notebook, "messages = ")


def test_the_library_the_helper_and_the_loop_by_hand_agree(notebook):
    assert said(notebook, "by_hand = ").rstrip().endswith("True")
    assert said(notebook, "generated = ").count("True") == 2
    assert said(notebook, "made.append(").rstrip().endswith(r"'\n']")


def test_the_cache_gives_the_same_tokens_sooner_and_without_a_stop_the_model_goes_on(notebook):
    shown = said(notebook, "slow_ids, slow = ")
    slow, fast = map(float, re.findall(r"缓存 ([\d.]+) 秒", shown))
    assert "token 相同： True" in shown
    assert fast < slow / 1.5
    (without_first, without_last), (_, with_last) = [
        map(float, re.findall(r"([\d.]+) 毫秒", line)) for line in shown.splitlines() if "四分之一" in line
    ]
    assert without_first < without_last and with_last < without_last / 2
    assert re.search(r"(\\n)+\S", shown), "text goes on after the newline; it is shown as a repr"
