"""Training data: every row format, every kind of bad row, and that the prompt of training is the prompt of inference."""

import copy
import gzip
import json
import random
import time
from collections import Counter

import pyarrow.parquet
import pytest
import torch
from reference import NANO, shared
from transformers import AutoTokenizer

import helpers
from helpers.characters.dialogues import Dialogue, load_dialogues
from helpers.chat.fitting import build_turns, encode_prompt, fit_turns
from helpers.errors import CharacterError, DataError
from helpers.finetune import (
    add_lora,
    describe_lengths,
    encode,
    encode_samples,
    load_samples,
    pack,
    pad,
    read_card,
    share_prefix,
    split_samples,
)
from helpers.finetune.command import DEFAULT_CARD, DEFAULT_DATA
from helpers.finetune.encoding import IGNORED, encode_lines
from helpers.finetune.report import CAUSES, BadRow
from helpers.inspect.xray import label_view

CARD = {"bot_name": "鲁智深", "bot_info": "自称洒家。", "user_name": "林冲", "user_info": ""}
META = {"bot_name": "阿九", "bot_info": "舰载人工智能", "user_name": "船长", "user_info": ""}
GOOD = {"instruction": "吃了吗", "input": "", "output": "洒家正要吃。"}


@pytest.fixture(scope="module", params=["nano", "real"])
def tokenizer(request):
    directory = NANO if request.param == "nano" else shared("golden/real_tokenizer")
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def nano_tokenizer():
    return AutoTokenizer.from_pretrained(NANO)


def write(tmp_path, *rows, name="rows.jsonl"):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    file = tmp_path / name
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


# --- formats


FORMATS = {
    "instruction": (GOOD, [["吃了吗", "洒家正要吃。"]]),
    "instruction and input": ({**GOOD, "input": "酒呢"}, [["吃了吗\n酒呢", "洒家正要吃。"]]),
    "input null": ({**GOOD, "input": None}, [["吃了吗", "洒家正要吃。"]]),
    "input absent": ({"instruction": "吃了吗", "output": "没有"}, [["吃了吗", "没有"]]),
    "pairs": ({"session_meta": META, "history": [["", "船长早"], ["早", "早"]]}, [["", "船长早"], ["早", "早"]]),
    "history of messages": (
        {"history": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        [["a", "b"]],
    ),
    "messages": (
        {
            "session_meta": META,
            "messages": [
                {"role": "assistant", "content": "船长早"},
                {"role": "user", "content": "早"},
                {"role": "user", "content": "几点了"},
                {"role": "assistant", "content": "七点"},
                {"role": "assistant", "content": "整"},
                {"role": "user", "content": "没有回答的话"},
            ],
        },
        [["", "船长早"], ["早 几点了", "七点 整"]],
    ),
    "CharacterDial": (
        {
            "bot_name": "阿九",
            "bot_profile": "舰载人工智能",
            "user_name": "船长",
            "user_profile": None,
            "dialogue": [{"speaker": "船长", "utterance": "早"}, {"speaker": "阿九", "utterance": "早上好"}],
        },
        [["早", "早上好"]],
    ),
    "alpaca with history": (
        {**GOOD, "history": [["早", "早啊"], ["冷吗", "不冷"]]},
        [["早", "早啊"], ["冷吗", "不冷"], ["吃了吗", "洒家正要吃。"]],
    ),
    "instruction empty": ({**GOOD, "instruction": "", "input": "吃了吗"}, [["吃了吗", "洒家正要吃。"]]),
    "prompt and response": ({"prompt": "a", "response": "b"}, [["a", "b"]]),
    "ChatGLM2": ({"content": "a", "summary": "b"}, [["a", "b"]]),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, [["a", "b"]]),
    "ChatGLM3": (
        {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        [["a", "b"]],
    ),
    "text in parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "c"},
            ]
        },
        [["ab", "c"]],
    ),
    "CharacterDial with roles": (
        {
            "session_meta": META,
            "dialogue": [{"speaker": "user", "utterance": "早"}, {"speaker": "bot", "utterance": "早上好"}],
        },
        [["早", "早上好"]],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_format(tmp_path, name):
    row, history = FORMATS[name]
    (sample,), report = load_samples(write(tmp_path, row), CARD)
    assert sample.history == history
    has_persona = "session_meta" in row or "bot_name" in row
    assert sample.card.model_dump() == (META if has_persona else CARD)
    assert report.problems == []


SYSTEM = [{"role": "system", "content": "你是阿九"}]
ASKED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("row", [{**GOOD, "system": "你是阿九"}, {"messages": SYSTEM + ASKED}])
def test_a_system_text_is_the_persona_of_its_row(tmp_path, row):
    """As for the API server (`helpers.serving.schemas`)."""
    (sample,), report = load_samples(write(tmp_path, row), CARD)
    assert (sample.card.bot_name, sample.card.bot_info) == ("角色", "你是阿九")
    assert "[persona from system]" in str(report)
    (sample,), _ = load_samples(write(tmp_path, {**row, "session_meta": META}))
    assert sample.card.model_dump() == {**META, "bot_info": "舰载人工智能 你是阿九"}


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_a_json_array_is_read_like_lines(tmp_path, bom):
    rows = [{**GOOD, "instruction": f"第{i}句"} for i in range(3)]
    file = tmp_path / "rows.json"
    file.write_text(bom + json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    samples, _ = load_samples(file, CARD)
    assert [sample.line for sample in samples] == [2, 7, 12]
    lines, _ = load_samples(write(tmp_path, *rows), CARD)
    assert [s.history for s in samples] == [s.history for s in lines]


def test_the_instruction_set_readers_bring_along():
    file = shared("data/huanhuan.json")
    samples, report = load_samples(file, {**CARD, "bot_name": "甄嬛"})
    rows = json.loads(file.read_text(encoding="utf-8"))
    distinct = {(row["instruction"], row["output"]) for row in rows}
    assert report.rows == len(rows) == 3729
    assert len(samples) == len(distinct)
    assert report.count_by_cause() == {"duplicate": len(rows) - len(distinct)}


# --- files


ROWS = [{"instruction": f"第{i}句", "input": "", "output": f"第{i}答"} for i in range(3)]
FILES = {
    "array.json": json.dumps(ROWS),
    "two arrays.json": json.dumps(ROWS[:1]) + "\n" + json.dumps(ROWS[1:], indent=1),
    "arrays in a line.json": json.dumps(ROWS[:1]) + json.dumps(ROWS[1:]),
    "wrapped.json": json.dumps({"data": ROWS}, indent=2),
    "wrapped in a line.json": json.dumps({"data": ROWS}),
    "one after another.json": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "table.csv": "instruction,input,output\n" + "".join(f"第{i}句,,第{i}答\n" for i in range(3)),
    "table.tsv": "instruction\tinput\toutput\n" + "".join(f"第{i}句\t\t第{i}答\n" for i in range(3)),
}


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_every_row_of_a_file_is_read(tmp_path, name, gzipped):
    file, content = tmp_path / name, FILES[name].encode()
    if gzipped:
        file, content = tmp_path / f"{name}.gz", gzip.compress(content)
    file.write_bytes(content)
    samples, report = load_samples(file, CARD)
    assert [sample.history for sample in samples] == [[[row["instruction"], row["output"]]] for row in ROWS]
    assert (report.rows, report.problems) == (3, [])


def test_parquet_is_read(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert len(load_samples(tmp_path / "rows.parquet", CARD)[0]) == 3


@pytest.mark.parametrize("name", ["rows.json.gz", "rows.parquet"])
def test_file_that_is_not_what_its_name_says(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match="cannot read file"):
        load_samples(tmp_path / name, CARD)


def test_a_damaged_item_costs_one_item(tmp_path):
    text = json.dumps(ROWS, indent=1, ensure_ascii=False).replace('"第1答"', '"第1答",')
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    samples, report = load_samples(tmp_path / "rows.json", CARD)
    assert [sample.history[0][0] for sample in samples] == ["第0句", "第2句"]
    assert [(line, cause) for line, cause, _ in report.problems] == [(7, "invalid json")]


def test_an_array_that_does_not_end_is_reported(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS)[:-1], encoding="utf-8")
    samples, report = load_samples(tmp_path / "rows.json", CARD)
    assert (len(samples), report.count_by_cause()) == (3, {"invalid json": 1})


def test_what_is_not_used_is_named(tmp_path):
    file = write(tmp_path, {**GOOD, "mood": "merry", "id": 7, "empty": ""}, {**GOOD, "output": "好", "mood": "sad"})
    _, report = load_samples(file, CARD)
    assert "没有用到的字段 [unused fields]：mood（2 行）" in str(report)


def test_unknown_shape_shows_what_was_found_and_what_is_known(tmp_path):
    with pytest.raises(DataError, match=r"字段是 question、answer；.*instruction/output.*conversations"):
        load_samples(write(tmp_path, {"question": "a", "answer": "b"}), CARD)


# --- bad rows


BAD_ROWS = {
    "not json": ("{", "invalid json"),
    "not an object": ([], "wrong type"),
    "no output": ({"instruction": "a"}, "missing field"),
    "no instruction": ({"output": "a"}, "missing field"),
    "number": ({**GOOD, "output": 5}, "wrong type"),
    "null": ({**GOOD, "output": None}, "wrong type"),
    "list": ({**GOOD, "input": []}, "wrong type"),
    "empty reply": ({**GOOD, "output": ""}, "empty"),
    "blank reply": ({**GOOD, "output": " \n"}, "empty"),
    "blank instruction": ({**GOOD, "instruction": " "}, "empty"),
    "empty history": ({"history": []}, "empty"),
    "one-sided pair": ({"history": [["a"]]}, "missing field"),
    "blank query later": ({"history": [["a", "b"], ["", "c"]]}, "empty"),
    "greeting only": ({"history": [["", "c"]]}, "empty"),
    "no reply": ({"messages": [{"role": "user", "content": "a"}]}, "empty"),
    "unknown role": ({"messages": [{"role": "tool", "content": "a"}]}, "wrong type"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]}, "wrong type"),
    "system only": ({"messages": [{"role": "system", "content": "a"}]}, "empty"),
    "unknown speaker": ({"dialogue": [{"speaker": "高俅", "utterance": "a"}]}, "wrong type"),
    "no speaker": ({"dialogue": [{"utterance": "a"}]}, "missing field"),
    "invalid persona": ({**GOOD, "session_meta": {"bot_name": ""}}, "wrong type"),
    "other fields": ({"question": "a", "answer": "b"}, "unknown format"),
    "lone surrogate": ('{"instruction": "\\ud83d", "output": "a"}', "broken encoding"),
    "replacement character": ({**GOOD, "output": "烫烫\ufffd"}, "broken encoding"),
    "the same again": (GOOD, "duplicate"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_is_reported_with_line_and_cause(tmp_path, name):
    bad, cause = BAD_ROWS[name]
    bad = json.dumps(bad) if bad == [] else bad
    file = write(tmp_path, GOOD, bad, "", {**GOOD, "output": "另一句。"})
    samples, report = load_samples(file, CARD)
    assert [sample.line for sample in samples] == [1, 4]
    assert [(line, found) for line, found, _ in report.problems] == [(2, cause)]
    assert report.count_by_cause() == Counter([cause])
    assert f"[{cause}] 1 行：第 2 行" in str(report)
    with pytest.raises(DataError, match=rf"bad rows.*rows\.jsonl：3 行，可用 2 行(?s:.*)\[{cause}\]"):
        load_samples(file, CARD, on_bad_row="raise")


def test_every_cause_is_tested():
    assert {cause for _, cause in BAD_ROWS.values()} | {"no persona", "too long"} == set(CAUSES)


def test_instruction_data_needs_a_card(tmp_path):
    with pytest.raises(DataError, match=r"no usable rows(?s:.*)\[no persona\] 1 行"):
        load_samples(write(tmp_path, GOOD))


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16"])
def test_file_in_another_encoding_is_read_and_said(tmp_path, encoding):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json.dumps(GOOD, ensure_ascii=False).encode(encoding))
    (sample,), report = load_samples(file, CARD)
    assert sample.history == [["吃了吗", "洒家正要吃。"]]
    assert f"[read as {'GBK' if encoding == 'gb18030' else 'UTF-16'}]" in str(report)


def test_one_broken_line_costs_one_line(tmp_path):
    lines = [json.dumps({**GOOD, "output": f"第{i}句"}, ensure_ascii=False).encode() for i in range(3)]
    lines[1] = lines[1][:-4] + b"\xff" + lines[1][-4:]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    samples, report = load_samples(tmp_path / "rows.jsonl", CARD)
    assert [sample.line for sample in samples] == [1, 3]
    assert report.count_by_cause() == {"broken encoding": 1}


def test_a_damaged_array_is_read_up_to_the_damage(tmp_path):
    text = json.dumps([GOOD, {**GOOD, "output": "好"}], indent=0, ensure_ascii=False)
    (tmp_path / "rows.json").write_text(text[:-20], encoding="utf-8")
    samples, report = load_samples(tmp_path / "rows.json", CARD)
    assert len(samples) == 1
    assert report.problems[0][:2] == (7, "invalid json")


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_file_that_cannot_be_read(tmp_path, name):
    with pytest.raises(DataError, match="cannot read file"):
        load_samples(tmp_path / name, CARD)


def test_unknown_way_to_treat_bad_rows(tmp_path):
    with pytest.raises(DataError, match="invalid on_bad_row"):
        load_samples(write(tmp_path, GOOD), CARD, on_bad_row="ignore")


# --- the card


def test_card_by_name_file_or_v2(tmp_path):
    assert read_card("阿九") == helpers.get_character("阿九")
    v2 = tmp_path / "card.json"
    v2.write_text(json.dumps(helpers.export_card_v2(helpers.get_character("阿九"))), encoding="utf-8")
    assert read_card(v2) == helpers.get_character("阿九")
    assert read_card(DEFAULT_CARD).bot_name == "鲁智深"
    with pytest.raises(CharacterError, match="file not found"):
        read_card("无名氏")


# --- the shipped set


@pytest.fixture(scope="module")
def shipped():
    return load_samples(DEFAULT_DATA, read_card(DEFAULT_CARD), on_bad_row="raise")[0]


def test_shipped_set_is_clean_and_in_voice(shipped):
    assert len(shipped) >= 600
    queries, replies = zip(*(sample.history[0] for sample in shipped))
    assert len(set(queries)) == len(set(replies)) == len(shipped)
    assert all(reply == reply.strip() and 8 <= len(reply) <= 40 for reply in replies)
    assert 0.75 < sum("洒家" in reply for reply in replies) / len(replies) < 0.95
    base = [reply for dialogue in load_dialogues() for _, reply in dialogue.history]
    assert not any("洒家" in reply for reply in base)


def test_a_fixed_tenth_is_held_out(shipped):
    training, held_out = split_samples(shipped)
    assert 0.07 < len(held_out) / len(shipped) < 0.13
    shuffled = random.Random(1).sample(shipped, len(shipped))
    assert {s.id for s in split_samples(shuffled)[1]} == {s.id for s in held_out}


def test_rows_that_begin_alike_are_on_one_side(tmp_path):
    rows = [{"instruction": f"问{i % 50}", "output": f"答{i}"} for i in range(200)]
    training, held_out = split_samples(load_samples(write(tmp_path, *rows), CARD)[0])
    assert {s.history[0][0] for s in training}.isdisjoint(s.history[0][0] for s in held_out)


ALIKE = {
    "same opening": lambda i: {"history": [["你好", "洒家在此。"], [f"问{i}", f"答{i}"]]},
    "same id": lambda i: {"id": "x", "instruction": f"问{i}", "output": f"答{i}"},
}


@pytest.mark.parametrize("name", ALIKE)
def test_rows_with_the_same_id_or_opening_are_split_by_content(tmp_path, capsys, name):
    samples, _ = load_samples(write(tmp_path, *(ALIKE[name](i) for i in range(100))), CARD)
    training, held_out = split_samples(samples)
    assert len(training) + len(held_out) == 100 and 3 < len(held_out) < 20
    assert "[split by whole conversations]" in capsys.readouterr().out
    assert split_samples(samples[::-1])[1] == held_out[::-1]


def test_too_few_rows_to_split(tmp_path):
    with pytest.raises(DataError, match="too few rows"):
        split_samples(load_samples(write(tmp_path, GOOD), CARD)[0])


# --- tokens: training reads what inference reads


def learned_positions(row):
    return [position for position, label in enumerate(row["labels"]) if label != IGNORED]


def replies_with_prompts(row, newline=13):
    """(prompt ids, reply ids) of every reply in a sequence."""
    starts = [
        p for p in learned_positions(row) if row["labels"][p - 1] == IGNORED or row["input_ids"][p - 1] == newline
    ]
    for start in starts:
        end = row["input_ids"].index(newline, start) + 1
        yield row["input_ids"][:start], row["input_ids"][start:end]


# Pieces of the real vocabulary that begin with "]", and replies that would be joined to the "]" before them.
AWKWARD = [
    "(笑)好",
    "](",
    "],嗯",
    "]]",
    ";)",
    ", ok",
    ": D",
    "[]",
    "😀好",
    " 两边空格 ",
    "1. 一",
    "第一行\n第二行",
    "<0x0A>好",
    "</s>",
]
SINGLE = [[["你好", reply]] for reply in AWKWARD]
MULTI = [
    [[f"第{i}句", reply] for i, reply in enumerate(AWKWARD)],
    [["", "（开场）(x)"], ["早", "(早)"], ["再见", "再见"]],
]


@pytest.mark.parametrize("history", [*SINGLE, *MULTI], ids=lambda history: f"{len(history)} {history[0][1][:6]}")
def test_training_prefix_is_the_inference_prompt_token_for_token(tokenizer, history):
    """Every reply is learned exactly once, right behind the ids that `chat` would give the model."""
    rows = encode(tokenizer, Dialogue("x", read_card(DEFAULT_CARD), history))
    pairs = [pair for row in rows for pair in replies_with_prompts(row)]
    turns = [turn for turn, (query, _) in enumerate(history) if query]
    assert len(pairs) == len(turns)
    for turn, (prompt, reply) in zip(turns, pairs):
        query, response = history[turn]
        assert prompt == encode_prompt(tokenizer, read_card(DEFAULT_CARD), query, history[:turn])
        assert reply[-1] == 13
        assert tokenizer.decode(reply).strip("\n") == " ".join(response.strip().splitlines())


def test_some_replies_do_join_the_name_in_the_real_vocabulary():
    """Else the test above would not try what it is there for."""
    tokenizer = AutoTokenizer.from_pretrained(shared("golden/real_tokenizer"))
    messages = Dialogue("x", read_card(DEFAULT_CARD), [["你好", "(笑)好"]]).messages
    whole = tokenizer.apply_chat_template(messages, session_meta=CARD)["input_ids"]
    prompt = encode_prompt(tokenizer, CARD, "你好", [])
    assert whole[: len(prompt)] != prompt
    assert len(encode(tokenizer, Dialogue("x", read_card(DEFAULT_CARD), MULTI[0]))) > 1


def test_ordinary_samples_are_what_the_template_masks(tokenizer, shipped):
    for sample in shipped[::20]:
        rendered = tokenizer.apply_chat_template(
            sample.messages, session_meta=sample.card, return_assistant_tokens_mask=True, return_dict=True
        )
        (row,) = encode(tokenizer, sample)
        assert row["input_ids"] == rendered["input_ids"]
        assert [label != IGNORED for label in row["labels"]] == [bool(m) for m in rendered["assistant_masks"]]


def test_labels_are_the_reply_and_its_newline(nano_tokenizer):
    history = [["", "开场白"], ["早", "早上好"], ["晚", "晚安。"]]
    (row,) = encode(nano_tokenizer, Dialogue("x", read_card(DEFAULT_CARD), history))
    assert nano_tokenizer.decode([label for label in row["labels"] if label != IGNORED]) == "早上好\n晚安。\n"
    assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"]))


def test_reply_ids_have_no_stray_space(tokenizer):
    _, _, (turn,) = encode_lines(tokenizer, Dialogue("x", read_card(DEFAULT_CARD), [["早", "好"]]))
    assert turn.reply == tokenizer("\n好\n", add_special_tokens=False)["input_ids"][2:]


def test_long_conversation_drops_oldest_turns_and_learns_every_reply(nano_tokenizer):
    card = read_card(DEFAULT_CARD)
    history = [[f"这是第{i}句话，说得比较长一些", f"第{i}句回答，也说得不短，直到最后一个字{i}。"] for i in range(40)]
    rows = encode(nano_tokenizer, Dialogue("x", card, history), max_length=400)
    assert len(rows) > 2
    assert max(len(row["input_ids"]) for row in rows) <= 400
    pairs = [pair for row in rows for pair in replies_with_prompts(row)]
    assert [nano_tokenizer.decode(reply).strip() for _, reply in pairs] == [reply for _, reply in history]
    for turn, (prompt, _) in enumerate(pairs):
        suffixes = (encode_prompt(nano_tokenizer, card, history[turn][0], history[s:turn]) for s in range(turn + 1))
        assert prompt in list(suffixes)  # a conversation without its oldest turns


def test_truncation_is_that_of_chat(nano_tokenizer):
    card = read_card(DEFAULT_CARD)
    history = [[f"问{i}" * 8, f"答{i}" * 8] for i in range(30)]
    *_, last = encode(nano_tokenizer, Dialogue("x", card, history), max_length=300)
    prompt, reply = list(replies_with_prompts(last))[0]
    turn = next(i for i, (_, r) in enumerate(history) if r == nano_tokenizer.decode(reply).strip())
    turns = build_turns(history[turn][0], history[:turn])
    assert prompt == fit_turns(nano_tokenizer, card, turns, 300 - len(reply))[0]


def test_time_grows_with_the_turns_not_with_their_square(nano_tokenizer):
    def seconds(turns: int) -> float:
        history = [[f"这是第{i}句话", f"（第{i}句）回答。"] for i in range(turns)]
        start = time.process_time()
        rows = encode(nano_tokenizer, Dialogue("x", read_card(DEFAULT_CARD), history))
        assert sum(len(list(replies_with_prompts(row))) for row in rows) == turns
        return time.process_time() - start

    seconds(10)
    assert seconds(2000) < 40 * seconds(200)  # 10 times as many; the square would be 100


def test_too_long_is_reported_not_cut(nano_tokenizer, tmp_path):
    file = write(tmp_path, GOOD, {**GOOD, "output": "很长" * 200})
    samples, report = load_samples(file, CARD)
    rows = encode_samples(nano_tokenizer, samples, 200, report)
    assert len(rows) == 1
    assert [(line, cause) for line, cause, _ in report.problems] == [(2, "too long")]
    with pytest.raises(DataError, match="too long"):
        encode_samples(nano_tokenizer, samples, 200, None, on_bad_row="raise")
    with pytest.raises(BadRow):
        encode(nano_tokenizer, samples[1], 200)


# --- batches: how rows are batched must not change what is learned


@pytest.fixture(scope="module")
def tuned():
    torch.manual_seed(0)
    model = add_lora(helpers.load("nano", dtype="float32")[0], dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def loss_and_gradient(model, batches, counts):
    """Mean loss of a learned token over the batches, and its gradient."""
    model.zero_grad()
    total = 0.0
    for batch, count in zip(batches, counts):
        loss = model(**batch).loss * count / sum(counts)
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture(scope="module")
def exact(tuned):
    """In float64: of lines that Nano never saw it is so unsure that float32 rounds its gradients in the fourth place."""
    return copy.deepcopy(tuned).double()


BATCHES = {
    "one character": lambda shipped: shipped[:5],
    "one row": lambda shipped: shipped[:1],
    "the same row twice": lambda shipped: [shipped[0], shipped[0]],
    "many characters, many turns": lambda shipped: load_dialogues()[::300],
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("batch", [pad, pack, share_prefix])
def test_a_batch_gives_loss_and_gradient_of_its_rows(nano_tokenizer, exact, shipped, name, batch):
    rows = encode_samples(nano_tokenizer, BATCHES[name](shipped))
    plain = [{key: torch.tensor([row[key]]) for key in ("input_ids", "labels")} for row in rows]
    counts = [len(learned_positions(row)) for row in rows]
    loss, gradient = loss_and_gradient(exact, plain, counts)
    batched_loss, batched_gradient = loss_and_gradient(exact, [batch(rows)], [sum(counts)])
    assert batched_loss == pytest.approx(loss, abs=1e-5)
    assert torch.allclose(batched_gradient, gradient, atol=1e-5)


def test_a_shared_prefix_is_there_once(nano_tokenizer, shipped):
    rows = encode_samples(nano_tokenizer, shipped[:4])
    batch = share_prefix(rows)
    tokens, apart = batch["input_ids"].numel(), sum(len(row["input_ids"]) for row in rows)
    assert tokens < 0.4 * apart  # the persona is most of a row
    assert len(batch["logits_to_keep"]) == sum(len(learned_positions(row)) for row in rows)


def test_lengths_are_described(nano_tokenizer, shipped):
    rows = encode_samples(nano_tokenizer, shipped[:10])
    facts = describe_lengths(rows)
    assert facts["sequences"] == 10
    assert facts["learned_tokens"] + facts["context_tokens"] == facts["tokens"]
    assert facts["padding_if_padded_to_512"] == 10 * 512 - facts["tokens"]
    with pytest.raises(DataError, match="no data"):
        describe_lengths([])


def test_label_view_colours_what_is_learned_and_escapes(nano_tokenizer):
    row = encode(nano_tokenizer, Dialogue("x", read_card(DEFAULT_CARD), [["<img src=x>", "<b>好</b>"]]))[0]
    view = label_view(nano_tokenizer, row)
    assert [kind == "learned" for _, _, kind in view.tokens] == [label != IGNORED for label in row["labels"]]
    assert "<img" not in view._repr_html_() and "<b>" not in view._repr_html_()
    assert repr(view).splitlines()[-1].startswith("要学的 learned: ")
