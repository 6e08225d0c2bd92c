"""The dialogues of `data/dialogues/`: what is in them, how they are split, and what a bad row says."""

import json
from collections import Counter

import pytest

import helpers
from helpers.characters.dialogues import DIALOGUES_DIR, history_to_messages, load_dialogues
from helpers.errors import HelpersError

SCRIPTED_QUESTIONS = ["你好呀，小苏", "最近对音乐有什么新的想法吗", "那我们商量一下下一部音乐电影的拍摄，好嘛？"]


@pytest.fixture(scope="module")
def dialogues():
    return load_dialogues()


@pytest.fixture(scope="module")
def exchanges(dialogues):
    """(character, query, response) of every exchange; a greeting has no query and is not one."""
    return [(d.card.bot_name, query, response) for d in dialogues for query, response in d.history if query]


def plain(text):
    """A text without punctuation and spaces."""
    return "".join(character for character in text if character.isalnum())


# --- what is in them


def test_every_character_has_its_file_and_enough_exchanges(exchanges):
    characters = helpers.load_characters()
    assert len(list(DIALOGUES_DIR.glob("*.jsonl"))) == len(characters) == 14
    count = Counter(character for character, _, _ in exchanges)
    assert count.total() >= 1500
    assert {name: n for name, n in count.items() if n < 100} == {}
    assert set(count) == set(characters)


def test_ids_are_unique(dialogues):
    assert [id for id, n in Counter(d.id for d in dialogues).items() if n > 1] == []


def test_conversations_are_multi_turn_and_alternate(dialogues):
    for dialogue in dialogues:
        roles = [message["role"] for message in dialogue.messages]
        assert all(earlier != later for earlier, later in zip(roles, roles[1:])), dialogue.id
        assert roles[-1] == "assistant", dialogue.id
        assert len(dialogue.history) >= 2, dialogue.id


def test_lines_are_clean(dialogues):
    for dialogue in dialogues:
        for query, response in dialogue.history:
            assert query == query.strip() and response == response.strip(), dialogue.id
            assert len((query + response).splitlines()) == 1, dialogue.id
            assert "\ufffd" not in query + response, dialogue.id
            assert 4 <= len(response) <= 80, (dialogue.id, response)
            assert len(query) <= 60, (dialogue.id, query)


def test_replies_vary(exchanges):
    repeated = [reply for reply, n in Counter((name, reply) for name, _, reply in exchanges).items() if n > 1]
    assert len(repeated) < 0.01 * len(exchanges), repeated[:5]
    queries = Counter(plain(query) for _, query, _ in exchanges)
    assert len(queries) > 0.8 * len(exchanges), queries.most_common(5)


def test_the_questions_of_notebook_01_are_not_trained_on(dialogues):
    trained = {plain(query) for d in dialogues if not d.held_out for query, _ in d.history}
    assert trained.isdisjoint(map(plain, SCRIPTED_QUESTIONS))


# --- the split


def test_a_tenth_is_held_out(dialogues):
    share = sum(d.held_out for d in dialogues) / len(dialogues)
    assert 0.07 < share < 0.13


def test_every_character_is_on_both_sides_of_the_split(dialogues):
    for held_out in (False, True):
        assert {d.card.bot_name for d in dialogues if d.held_out is held_out} == set(helpers.load_characters())


def test_nothing_held_out_is_trained_on(dialogues):
    """By conversation, and no exchange of a held-out one occurs word for word in the training data either."""
    held_out = [d for d in dialogues if d.held_out]
    training = [d for d in dialogues if not d.held_out]
    assert {d.id for d in held_out}.isdisjoint(d.id for d in training)
    trained = {(plain(query), plain(response)) for d in training for query, response in d.history if query}
    seen = [(d.id, q, r) for d in held_out for q, r in d.history if q and (plain(q), plain(r)) in trained]
    assert seen == []


def test_the_split_does_not_depend_on_the_order_or_on_other_dialogues(dialogues):
    again = {d.id: d.held_out for d in reversed(load_dialogues())}
    assert again == {d.id: d.held_out for d in dialogues}


# --- reading

GOOD = {"id": "x-1", "character": "阿九", "history": [["", "船长早"], ["早", "早上好，船长"]]}


def read(tmp_path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return load_dialogues(tmp_path)


def test_a_good_row(tmp_path):
    (dialogue,) = read(tmp_path, GOOD)
    assert dialogue.history == GOOD["history"]
    assert dialogue.card == helpers.get_character("阿九")
    assert dialogue.messages == [
        {"role": "assistant", "content": "船长早"},
        {"role": "user", "content": "早"},
        {"role": "assistant", "content": "早上好，船长"},
    ]
    assert history_to_messages(dialogue.history) == dialogue.messages


def test_a_line_separator_inside_a_text_is_no_new_row(tmp_path):
    (dialogue,) = read(tmp_path, {**GOOD, "history": [["a\u2028b", "c\x85d"]]})
    assert dialogue.history == [["a\u2028b", "c\x85d"]]


@pytest.mark.parametrize(
    "row, problem",
    [
        ("", "整行"),
        ("{", "整行"),
        ("[]", "整行"),
        ({k: v for k, v in GOOD.items() if k != "id"}, "id"),
        ({**GOOD, "id": ""}, "id"),
        ({**GOOD, "id": 5}, "id"),
        ({**GOOD, "character": "无名氏"}, "无名氏"),
        ({**GOOD, "history": []}, "history"),
        ({**GOOD, "history": "早"}, "history"),
        ({**GOOD, "history": ["早早"]}, "history.0"),
        ({**GOOD, "history": [["早"]]}, "history.0"),
        ({**GOOD, "history": [["早", "早", "早"]]}, "history.0"),
        ({**GOOD, "history": [["早", 5]]}, "history.0"),
        ({**GOOD, "history": [["早", None]]}, "history.0"),
        ({**GOOD, "history": [["早", " "]]}, "history.0"),
        ({**GOOD, "history": [["早", "早"], ["", "早"]]}, "query"),
    ],
)
def test_bad_row_names_file_and_line(tmp_path, row, problem):
    with pytest.raises(HelpersError, match=rf"rows\.jsonl 第 2 行.*invalid dialogue.*{problem}"):
        read(tmp_path, GOOD, row, GOOD)


def test_bad_file_is_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes("早".encode("gb18030"))
    with pytest.raises(HelpersError, match="latin.jsonl.*invalid UTF-8"):
        load_dialogues(tmp_path)


def test_directory_without_dialogues(tmp_path):
    with pytest.raises(HelpersError, match="no dialogue files"):
        load_dialogues(tmp_path)
    with pytest.raises(HelpersError, match="no dialogue files"):
        load_dialogues(tmp_path / "nowhere")
