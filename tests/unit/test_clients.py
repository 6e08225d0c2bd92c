"""What becomes of requests as role-play clients send them: the bodies in `tests/clients/requests` are SillyTavern's."""

import gzip
import json
from pathlib import Path

import pytest
from live_server import ask, nano_server, wait_until
from transformers import AutoTokenizer

import helpers
from helpers.chat.fitting import encode_turns
from helpers.errors import HelpersError
from helpers.serving.app import check_origins
from helpers.serving.prompts import chat_prompt, last_query
from helpers.serving.schemas import ChatRequest

REQUESTS = Path(__file__).parents[1] / "clients" / "requests"
CHAT = "/v1/chat/completions"
INFO = helpers.get_character("苏梦远").bot_info
HEAD = f"以下是一段苏梦远和Anon之间的对话。\n关于苏梦远的信息：{INFO}\n[苏梦远]陆导您好！今天我们一起聊点什么呢？\n[Anon]你好，最近怎么样？\n"
EXAMPLES = "[Anon]你叫什么？\n[阿青]阿青。\n[Anon]冷吗？\n[阿青]*摇头* 习惯了。\n"
QING = (
    "以下是一段阿青和Anon之间的对话。\n"
    "关于阿青的信息：用中文回答。 阿青是山里的剑客，话很少，Anon是迷路的旅人。 冷静 雪夜的山中小屋\n"
)
TALK = "[阿青]*抬头* Anon，什么人？\n[Anon]你叫什么？"
SAID = "有些事，没有生气，心思也会算朋友生意。"
META = {"bot_name": "阿青", "user_name": "旅人"}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(helpers.resolve_model("nano"))


@pytest.fixture(scope="module")
def server():
    model = helpers.load("nano", dtype="float32", device_map="cpu")
    with nano_server(model, slots=3, served_model_name="my-model") as running:
        yield running


def body(name: str) -> ChatRequest:
    return ChatRequest(**json.loads((REQUESTS / f"{name}.json").read_text(encoding="utf-8")))


def talk(*messages: dict, **fields) -> ChatRequest:
    meta = {"session_meta": META}
    return ChatRequest(messages=list(messages), chat_template_kwargs=meta, **fields)


def user(text, **fields):
    return {"role": "user", "content": text, **fields}


def bot(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def system(text, **fields):
    return {"role": "system", "content": text, **fields}


def prompt(tokenizer, request: ChatRequest, character=None) -> str:
    persona, turns = chat_prompt(request, character)
    return tokenizer.decode(encode_turns(tokenizer, persona, turns), skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    "name, expected",
    [
        ("default", HEAD + "[苏梦远]"),
        ("examples", QING + EXAMPLES + TALK + "（只说一句话。）\n[阿青]"),
        ("prefill", QING + EXAMPLES + TALK + "（只说一句话。）\n[阿青]像緃发白班，替我守着眼，反倒是红弄成一回。"),
        ("impersonate", f"{HEAD}[苏梦远]{SAID}\n[Anon]"),
    ],
)
def test_requests_of_sillytavern(tokenizer, name, expected):
    assert prompt(tokenizer, body(name)) == expected


def test_a_narrator_stays_in_the_turn(tokenizer):
    text = prompt(tokenizer, body("narrator"))
    assert text.endswith("[Anon]两个（门突然开了，风吹灭了蜡烛。）\n[Anon]谁在那里？\n[苏梦远]")
    assert f"信息：{INFO}\n[苏梦远]陆导" in text


def test_a_card_in_a_single_user_message(tokenizer):
    text = prompt(tokenizer, body("single"))
    assert text.startswith(QING + EXAMPLES + TALK + "\n[阿青]像緃")
    assert text.endswith("[Anon]冷吗？（只说一句话。）\n[阿青]")


def test_what_a_narrator_says_before_the_user(tokenizer):
    text = prompt(tokenizer, talk(user("你好"), bot("嗯"), system("门开了。"), user("谁？")))
    assert text.endswith("[旅人]你好\n[阿青]嗯\n[旅人]（门开了。）谁？\n[阿青]")


def test_spaces_around_a_message_do_not_part_it_from_its_narrator(tokenizer):
    text = prompt(tokenizer, talk(user("你好\n "), system(" 小声\n")))
    assert text.endswith("[旅人]你好（小声）\n[阿青]")


def test_names_from_name_fields(tokenizer):
    messages = [system("山里的剑客"), user("你好", name="旅人"), bot("嗯", name="阿青"), user("冷吗")]
    text = prompt(tokenizer, ChatRequest(messages=messages))
    assert text.startswith("以下是一段阿青和旅人之间的对话。\n关于阿青的信息：山里的剑客\n")


def test_what_is_given_counts_more_than_what_is_found(tokenizer):
    request = body("default").model_copy(update={"chat_template_kwargs": talk(user("x")).chat_template_kwargs})
    assert prompt(tokenizer, request).startswith("以下是一段阿青和旅人之间的对话。\n关于阿青的信息：苏梦远，本名")


@pytest.mark.parametrize(
    "fields, end",
    [
        ({}, "[阿青]我是"),
        ({"continue_final_message": True}, "[阿青]我是"),
        ({"continue_final_message": False}, "[阿青]我是\n[阿青]"),
        ({"add_generation_prompt": True}, "[阿青]我是\n[阿青]"),
    ],
)
def test_an_assistant_that_had_the_last_word_goes_on(tokenizer, fields, end):
    assert prompt(tokenizer, talk(user("你是谁"), bot("我是"), **fields)).endswith(f"[旅人]你是谁\n{end}")


def test_a_user_message_can_be_continued(tokenizer):
    assert prompt(tokenizer, talk(user("你是"), continue_final_message=True)).endswith("[旅人]你是")


@pytest.mark.parametrize(
    "fields", [{"continue_final_message": True, "add_generation_prompt": True}, {"add_generation_prompt": False}]
)
def test_what_cannot_be_honoured_is_refused(fields):
    with pytest.raises(HelpersError, match="cannot do both|not supported"):
        chat_prompt(talk(user("x"), **fields), None)


def test_tools_in_a_history_are_left_out(tokenizer):
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {}}]}
    result = {"role": "tool", "content": [{"type": "image_url"}], "tool_call_id": "1"}
    text = prompt(tokenizer, talk(user("你好"), call, result, {"role": "assistant"}, bot("嗯"), user("冷吗")))
    assert text.endswith("之间的对话。\n[旅人]你好\n[阿青]嗯\n[旅人]冷吗\n[阿青]")


@pytest.mark.parametrize("unset", [0, -1])
def test_unset_values_are_defaults(unset):
    fields = {"max_tokens": unset, "top_p": unset, "repetition_penalty": unset, "stop": ["", ""]}
    request = talk(user("x"), **fields)
    assert request.generation() == {} and request.stops() == []
    assert talk(user("x"), stop="").stops() == []


def test_the_query_is_what_the_user_said():
    _, turns = chat_prompt(talk(user("你是谁"), system("小声"), bot("我是")), None)
    assert last_query(turns) == "你是谁"


def test_hostile_texts_are_fast(tokenizer):
    for text in ("Write a's next reply in a fictional chat between " * 2000, "[Continue your last message" * 3000):
        chat_prompt(ChatRequest(messages=[system(text), user("x")]), None)


@pytest.mark.parametrize("origin", ["my.page", "https://my.page/", "https://my.page/x", "", "https://"])
def test_origins_are_checked(origin):
    with pytest.raises(HelpersError, match="invalid origin"):
        check_origins((origin,))
    check_origins(("https://my.page", "http://127.0.0.1:8000", "*"))


# --- over a socket


@pytest.mark.parametrize("stream", [False, True])
def test_two_replies(server, stream):
    sent = ask(n=2, stream=stream, temperature=1.5, seed=1, stream_options={"include_usage": True})
    response = server.client.post(CHAT, json=sent).raise_for_status()
    if stream:
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        pieces = [event["choices"][0] for event in events if event["choices"]]
        texts = ["".join(p["delta"].get("content", "") for p in pieces if p["index"] == n) for n in (0, 1)]
        usage = events[-1]["usage"]
    else:
        answer = response.json()
        texts, usage = [choice["message"]["content"] for choice in answer["choices"]], answer["usage"]
    assert texts[0] != texts[1]
    assert 2 <= usage["completion_tokens"] <= 16
    wait_until(server.idle)


def test_names_of_the_model(server):
    for name in ("characterglm", "my-model", server.service.name, "苏梦远"):
        assert server.client.get(f"/v1/models/{name}").json()["id"] == name
        assert server.client.post(CHAT, json=ask(model=name)).status_code == 200
    assert server.client.get("/v1/models/gpt-4").json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
def test_other_interfaces_name_the_right_one(server, path):
    response = server.client.post(path, json={"prompt": "x"})
    assert response.status_code == 404 and "/v1/chat/completions" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/characterglm", "/metrics"])
def test_head_where_get_is(server, path):
    assert server.client.head(path).status_code == 200


def test_bodies_in_other_forms(server):
    kind = {"Content-Type": "application/json"}
    content = json.dumps(ask(), ensure_ascii=False)
    packed = {**kind, "Content-Encoding": "gzip"}
    assert server.client.post(CHAT, content=gzip.compress(content.encode()), headers=packed).status_code == 200
    for sent, headers, status, problem in [
        (gzip.compress(b" " * 10**7), packed, 413, "body too large"),
        (content.encode(), packed, 400, "damaged gzip"),
        (content.encode("gbk"), kind, 400, "UTF-8"),
        (content.encode(), {"Content-Type": "text/plain"}, 400, "wrong content type.*text/plain"),
        (json.dumps(ask(stop=[5])).encode(), kind, 400, "stop"),
    ]:
        response = server.client.post(CHAT, content=sent, headers=headers)
        assert response.status_code == status
        message = response.json()["error"]["message"]
        assert (
            all(word in message for word in problem.split(".*")) and "0x" not in message and "function-" not in message
        )


# --- cards in a conversation


def test_examples_and_greetings_of_a_card_in_a_session(server):
    card = helpers.CharacterCard(**META, greeting="一", alternate_greetings=["二"], examples=[["冷吗", "不冷"]])
    session = helpers.ChatSession(*server.service.source, card)
    assert session.alternatives == ["一", "二"] and session.swipe() == "二"
    assert session.history == [["", "二"]]
    short = helpers.ChatSession(*server.service.source, card.model_copy(update={"examples": []}))
    assert session.context_used()[0] > short.context_used()[0]
    session.send("你好", max_new_tokens=2)
    with pytest.raises(HelpersError, match="prompt too long.*人设"):
        session.send("长" * 3000)
