"""Decoding with torch.compile writes what plain decoding writes, token for token, and says where it cannot."""

import pytest

import helpers
from helpers.chat import reply
from helpers.chat.fitting import context_length
from helpers.chat.generation import GenerationParameters
from helpers.errors import HelpersError
from helpers.model import kv_cache
from helpers.model.kv_cache import PromptCache, compile_decoding, compiled_decoding, new_cache

GREEDY = {"do_sample": False, "max_new_tokens": 10}
CPU = {"dtype": "float32", "device_map": "cpu"}


@pytest.fixture(scope="module")
def plain():
    return helpers.load("nano", **CPU)


@pytest.fixture(scope="module", params=["cache", pytest.param("inductor", marks=pytest.mark.slow)])
def compiled(request):
    """The cache of fixed length, and with it what Inductor makes of the model: once for all, as it takes a minute."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "cache":
            patch.setattr(reply, "compile_config", lambda device: None)
        model, tokenizer = helpers.load("nano", compile=True, **CPU)
        yield model, tokenizer
        assert hasattr(model, "_compiled_call") == (request.param == "inductor")


@pytest.fixture(scope="module")
def card():
    return helpers.get_character("苏梦远")


def talk(session) -> list:
    """A conversation that grows, goes back, changes its mind and its persona; every reply."""
    said = [session.send("你好呀，小苏"), session.send("最近对音乐有什么新的想法吗")]
    said.append(session.regenerate())
    session.undo()
    said += [session.send("我们去海边吧"), session.send("好，明天见", seed=3, do_sample=True, temperature=0.8)]
    session.edit(response="明天早上八点，不见不散。")
    said.append(session.send("八点会不会太早？"))
    session.set_persona(helpers.get_character("林黛玉"))
    said.append(session.send("你是谁？"))
    session.clear()
    return [*said, session.send("再见")]


def test_compiled_replies_are_those_of_the_plain_model(plain, compiled, card):
    wanted = talk(helpers.ChatSession(*plain, card, **GREEDY))
    session = helpers.ChatSession(*compiled, card, **GREEDY)
    assert talk(session) == wanted
    session.set_persona(card)
    session.clear()
    assert talk(session) == wanted  # in a cache full of what it said before
    assert not hasattr(plain[0], "_compiled_call")


def test_the_cache_is_kept_from_turn_to_turn(compiled, card, monkeypatch):
    kept = []
    reuse = kv_cache.StaticPromptCache.reuse
    monkeypatch.setattr(
        kv_cache.StaticPromptCache, "reuse", lambda self, ids: kept.append((reuse(self, ids), len(ids))) or kept[-1][0]
    )
    session = helpers.ChatSession(*compiled, card, **GREEDY)
    session.send("你好")
    session.send("今天天气不错")
    session.regenerate()
    (first, length), (second, longer), (again, same) = kept
    assert first == 0
    assert length < second < longer  # the reply too was not computed again
    assert (again, same) == (longer - 1, longer)


def test_conversations_that_take_turns_do_not_mix(plain, compiled, card):
    other = helpers.get_character("林黛玉")
    replies = {}
    for name, (model, tokenizer) in {"plain": plain, "compiled": compiled}.items():
        sessions = [helpers.ChatSession(model, tokenizer, persona, **GREEDY) for persona in (card, other)]
        replies[name] = [session.send(query) for query in ("你好", "你在做什么？") for session in sessions]
        replies[name].append(helpers.chat(model, tokenizer, card, "晚安", sessions[0].history, **GREEDY)[0])
        sessions[1].free_cache()
        replies[name].append(sessions[0].send("晚安"))
    assert replies["compiled"] == replies["plain"]


def test_a_reply_after_an_error_or_a_stop_is_right(plain, compiled, card, monkeypatch):
    session = helpers.ChatSession(*compiled, card, **GREEDY)
    wanted, _ = helpers.chat(*plain, card, "你好", session.history, **GREEDY)  # the greeting is part of it
    layer = compiled[0].model.layers[2].mlp
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="between two layers"):
        patch.setattr(layer, "forward", lambda x: (_ for _ in ()).throw(RuntimeError("between two layers")))
        session.send("你好")  # the prompt is not compiled, so this is seen
    assert session.send("你好") == wanted
    session.undo()
    replies = session.stream("你好")
    next(replies)
    replies.close()
    session.undo()
    assert session.send("你好") == wanted


def test_beam_search_and_long_prompts(plain, compiled, card):
    beams = {"do_sample": False, "num_beams": 2, "max_new_tokens": 6}
    assert helpers.chat(*compiled, card, "你好", **beams)[0] == helpers.chat(*plain, card, "你好", **beams)[0]
    history = [[f"第{n}句", "嗯，我听见了，你继续说吧。"] for n in range(90)]
    assert helpers.chat(*compiled, card, "你好", history, **GREEDY) == helpers.chat(
        *plain, card, "你好", history, **GREEDY
    )


def test_a_shorter_cache_shortens_the_context(card):
    model, tokenizer = helpers.load("nano", **CPU)
    compile_decoding(model, length=256)
    assert context_length(model) == 256
    session = helpers.ChatSession(model, tokenizer, card, **GREEDY)
    assert session.context_used()[1] == 256
    assert isinstance(kv_cache.new_cache(model), kv_cache.StaticPromptCache)
    compile_decoding(model, length=10**6)
    assert compiled_decoding(model).length == model.config.max_position_embeddings


def test_an_ordinary_model_keeps_its_growing_cache(plain):
    assert type(new_cache(plain[0])) is PromptCache
    assert context_length(plain[0]) == plain[0].config.max_position_embeddings


def test_it_says_that_the_first_reply_takes_long(caplog):
    helpers.load("nano", compile=True, **CPU)
    assert [record.getMessage() for record in caplog.records if "takes about a minute" in record.getMessage()]


def test_how_to_compile_is_not_the_callers_choice():
    with pytest.raises(HelpersError, match=r"compile_config.*\[fixed parameter\]"):
        GenerationParameters.check({"compile_config": {}})


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantised_model_is_refused(quantization):
    with pytest.raises(HelpersError, match=r"cannot compile a quantised model.*只能选一个"):
        helpers.load("nano", compile=True, quantization=quantization)
    with pytest.raises(HelpersError, match="cannot compile a quantised model"):
        compile_decoding(helpers.load("nano", quantization=quantization, **CPU)[0])


def test_a_machine_without_a_compiler_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(HelpersError, match=r"C\+\+ compiler.*tools missing.*apt-get install"):
        helpers.load("nano", compile=True, **CPU)


def test_missing_headers_and_triton_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(kv_cache.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(kv_cache.importlib.util, "find_spec", lambda name: None)
    assert kv_cache._missing_tools("cuda")[-2:] == ["Python.h", "triton"]
    assert "triton" not in kv_cache._missing_tools("cpu")


@pytest.mark.parametrize("places", [{"a": 0, "b": "cpu"}, {"a": "disk"}, {"a": "mps"}])
def test_a_model_that_is_spread_or_elsewhere_is_refused(places):
    model, _ = helpers.load("nano", **CPU)
    model.hf_device_map = places
    with pytest.raises(HelpersError, match="cannot compile here"):
        compile_decoding(model)
