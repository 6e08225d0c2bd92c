"""Chat, streaming and sessions, on CharacterGLM-Nano in float32. Hooks on the real model slow it down, make it fail,
or make it say what a test needs; everything else is the real thing."""

import gc
import json
import random
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import helpers
from helpers.characters.dialogues import load_dialogues
from helpers.chat.fitting import build_turns, cut_persona, encode_prompt, encode_turns, fit_turns
from helpers.chat.generation import (
    STOP_IDS,
    GenerationParameters,
    StreamDecoder,
    decode_growing,
    decode_reply,
    model_defaults,
)
from helpers.chat.reply import Reply
from helpers.errors import BusyError, CharacterError, ChatError, PromptTooLongError
from helpers.model.kv_cache import PromptCache, common_prefix_length
from helpers.model.loading import NANO_DIR
from helpers.model.tokenization import piece_bytes

GOLDEN = Path(__file__).parent.parent / "golden" / "compact"
GREEDY = {"do_sample": False, "max_new_tokens": 12}
LONG = 400
ENDLESS = {**GREEDY, "max_new_tokens": LONG, "min_new_tokens": LONG}  # fewer forward passes: it was ended
META = {"bot_name": "苏梦远", "bot_info": "歌手", "user_name": "陆星辰", "user_info": "导演"}
NOT_ASCII = ["😀😁🤖", "𠮷野家的𩸽和𪚥", "👨‍👩‍👧‍👦一家", "a😀b𠮷c", "☃️雪人☃", "（笑）𝕳𝖎，你好"]


@pytest.fixture(scope="module")
def nano():
    return helpers.load("nano", dtype="float32", device_map="cpu")


@pytest.fixture(scope="module")
def card():
    return helpers.get_character("苏梦远")


@pytest.fixture
def session(nano, card):
    return helpers.ChatSession(*nano, card, **GREEDY)


@pytest.fixture
def generated(nano, monkeypatch):
    """What goes into `generate` and comes out of it: a list of (prompt ids, GenerationConfig, reply ids)."""
    calls, generate = [], nano[0].generate

    def spy(prompt, **options):
        output = generate(prompt, **options)
        calls.append((prompt[0].tolist(), options["generation_config"], output[0, prompt.shape[1] :].tolist()))
        return output

    monkeypatch.setattr(nano[0], "generate", spy)
    return calls


@contextmanager
def each_forward(model, action):
    """Call `action(number, input_ids)` before every forward pass; yields the lengths of the inputs so far."""
    lengths = []

    def hook(module, args, kwargs):
        lengths.append(kwargs["input_ids"].shape[1])
        action(len(lengths), kwargs["input_ids"])

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield lengths
    finally:
        handle.remove()


def slow(seconds=0.01):
    return lambda number, input_ids: time.sleep(seconds)


@contextmanager
def says(model, token_ids):
    """Make the model say these tokens, then a newline, whatever the prompt."""
    script = iter(token_ids)

    def hook(module, args, output):
        output.logits[:, -1, :] = -1e4
        output.logits[:, -1, next(script, 13)] = 1e4

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def text_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(autouse=True)
def running(monkeypatch):
    """The replies that have been started and not ended, at the time of the call."""
    started, start = [], Reply.start
    monkeypatch.setattr(Reply, "start", lambda self: started.append(self) or start(self))
    return lambda: [reply for reply in started if reply.running]


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# --- chat


def test_chat_returns_reply_and_new_history(nano, card):
    history = [["", "你来了"], ["在吗", "在的"]]
    before = [list(entry) for entry in history]
    response, new_history = helpers.chat(*nano, card, "你好呀", history, **GREEDY)
    assert history == before
    assert new_history == [*before, ["你好呀", response]]
    new_history[0][1] = "改了"
    assert history == before, "the returned history shares its entries with the caller's"


def test_history_may_be_tuples_or_none(nano, card):
    assert helpers.chat(*nano, card, "你好", None, **GREEDY) == helpers.chat(*nano, card, "你好", [], **GREEDY)
    as_tuples = helpers.chat(*nano, card, "你好", (("在吗", "在的"),), **GREEDY)
    assert as_tuples == helpers.chat(*nano, card, "你好", [["在吗", "在的"]], **GREEDY)


def test_vendor_defaults_reach_generate(nano, card, generated, monkeypatch):
    """A model directory without a generation_config.json, as CharacterGLM-6B's."""
    original = AutoModelForCausalLM.from_pretrained(GOLDEN)
    assert model_defaults(original) == {}
    monkeypatch.setattr(nano[0], "generation_config", original.generation_config)
    helpers.chat(*nano, card, "你好")
    config = generated[0][1]
    assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 0.9, 100, 0.9)
    assert (config.repetition_penalty, config.max_new_tokens, config.num_beams) == (1.3, 512, 1)
    assert config.eos_token_id == [2, 13]


def test_defaults_are_the_models_then_the_callers(nano, card, generated, monkeypatch):
    own = GenerationConfig(temperature=0.5, repetition_penalty=1.0, max_new_tokens=6, eos_token_id=99)
    monkeypatch.setattr(nano[0], "generation_config", own)
    helpers.chat(*nano, card, "你好", temperature=0.7)
    config = generated[0][1]
    assert (config.temperature, config.repetition_penalty, config.max_new_tokens) == (0.7, 1.0, 6)
    assert (config.top_p, config.eos_token_id) == (0.9, [2, 13])


def test_generation_config_file_of_nano_is_honoured(nano):
    file = json.loads((NANO_DIR / "generation_config.json").read_text())
    not_parameters = ("eos_token_id", "pad_token_id", "transformers_version")
    assert model_defaults(nano[0]) == {k: v for k, v in file.items() if k not in not_parameters}


@pytest.mark.parametrize(
    "parameters",
    [
        {"do_sample": False, "num_beams": 2},
        {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
        {"temperature": 1, "top_p": 1, "top_k": 0, "repetition_penalty": 1},
        {"no_repeat_ngram_size": 2, "min_p": 0.05, "typical_p": 0.9},
        {"bad_words_ids": [[100]], "suppress_tokens": [200], "renormalize_logits": True},
        {"prompt_lookup_num_tokens": 3, "do_sample": False},
        {"max_time": 30.0, "guidance_scale": 1.5},
    ],
)
def test_every_parameter_can_be_passed(nano, card, generated, parameters):
    helpers.chat(*nano, card, "你好", max_new_tokens=6, **parameters)
    config = generated[0][1]
    assert {name: getattr(config, name) for name in parameters} == parameters


def test_min_new_tokens_and_ngrams_have_their_effect(nano, card, generated):
    helpers.chat(*nano, card, "你好", do_sample=False, max_new_tokens=30, min_new_tokens=30, no_repeat_ngram_size=1)
    reply = generated[0][2]
    assert len(reply) == 30
    assert max(Counter(reply).values()) == 1


def test_sampling_parameters_are_neutral_in_greedy_search(nano, card, generated):
    helpers.chat(*nano, card, "你好", do_sample=False, temperature=0.3, max_new_tokens=4)
    config = generated[0][1]
    assert (config.temperature, config.top_k, config.top_p, config.min_p) == (1.0, 50, 1.0, None)


SENSELESS = [
    *({"temperature": value} for value in (0, -1, float("nan"), float("inf"), 1e9, "0.9", True, None, [0.9])),
    *({"top_p": value} for value in (0, -0.1, 1.01, float("nan"), "1", False)),
    *({"top_k": value} for value in (-1, 1.5, "3", True)),
    *({"repetition_penalty": value} for value in (0, -1, float("nan"), float("inf"), "1.3")),
    *({"max_new_tokens": value} for value in (0, -5, 2.5, "9", True, None)),
    *({"max_length": value} for value in (0, -1, 10.5, "100")),
    *({"num_beams": value} for value in (0, -2, 1.5, "2")),
    *({"seed": value} for value in (-1, 2**63, 1.5, "7", True)),
    *({"do_sample": value} for value in (1, 0, "yes", None)),
    *({"min_new_tokens": value} for value in (-1, 1.5, "3")),
    {"min_new_tokens": 20, "max_new_tokens": 10},
    {"no_repeat_ngram_size": -1},
    {"min_p": 1.5},
    {"typical_p": 0},
    {"length_penalty": float("nan"), "num_beams": 2},
    {"early_stopping": "sometimes", "num_beams": 2},
    {"eos_token_id": 5},
    {"pad_token_id": 5},
    {"num_return_sequences": 2},
    {"return_dict_in_generate": True},
    {"use_cache": False},
    {"stop_strings": ["。"]},
]


@pytest.mark.parametrize("parameters", SENSELESS, ids=repr)
def test_senseless_parameters_are_refused_before_anything_runs(nano, card, session, generated, parameters):
    before = session.export()
    name = next(iter(parameters))
    with pytest.raises(ChatError, match=name):
        helpers.chat(*nano, card, "你好", **parameters)
    with pytest.raises(ChatError, match=name):
        session.send("你好", **parameters)
    with pytest.raises(ChatError, match=name):
        next(session.stream("你好", **parameters))
    assert session.export() == before
    assert generated == []


@pytest.mark.parametrize(
    "wrong, right",
    [("temprature", "temperature"), ("topp", "top_p"), ("max_tokens", "max_new_tokens"), ("do_sampel", "do_sample")],
)
def test_unknown_parameter_is_refused_with_a_suggestion(nano, card, wrong, right):
    with pytest.raises(ChatError, match=rf"unknown generation parameter.*{wrong}.*{right}"):
        helpers.chat(*nano, card, "你好", **{wrong: 1})
    with pytest.raises(ChatError, match="unknown generation parameter"):
        helpers.ChatSession(*nano, card, **{wrong: 1})


def test_unlike_anything_known_lists_the_usual_ones(nano, card):
    with pytest.raises(ChatError, match="zzzzqqqq.*temperature"):
        helpers.chat(*nano, card, "你好", zzzzqqqq=1)


@pytest.mark.parametrize("end", [2, 13], ids=["eos", "newline"])
@pytest.mark.parametrize("text", ["好的，没问题", ""], ids=["after a text", "at once"])
def test_reply_stops_at_newline_or_eos(nano, card, generated, end, text):
    script = [*text_ids(nano[1], text), end, *text_ids(nano[1], "不该出现")] if text else [end, 100, 101]
    with says(nano[0], script):
        response, history = helpers.chat(*nano, card, "你好", do_sample=False, repetition_penalty=1.0)
    assert response == text
    assert history == [["你好", text]]
    assert generated[0][2][-1] == end


def test_an_empty_reply_is_streamed_once(nano, card):
    with says(nano[0], [13]):
        assert list(helpers.stream_chat(*nano, card, "你好", do_sample=False)) == [""]


def test_beam_search_comes_in_one_piece_and_equals_chat(nano, card):
    beams = {**GREEDY, "num_beams": 2}
    pieces = list(helpers.stream_chat(*nano, card, "你好", **beams))
    assert pieces == [helpers.chat(*nano, card, "你好", **beams)[0]]


@pytest.mark.parametrize("query", ["", "   ", "\n\t", None, 5, ["你好"], b"hi", "坏\ud800字"], ids=repr)
def test_bad_query_is_refused(nano, card, session, generated, query):
    before = session.export()
    for ask in (lambda: helpers.chat(*nano, card, query), lambda: session.send(query)):
        with pytest.raises(ChatError, match="query"):
            ask()
    assert session.export() == before
    assert generated == []


BAD_HISTORIES = [
    *("你好", 5, {"a": "b"}, iter([["a", "b"]]), ["你好"], [["你好"]], [["a", "b", "c"]], [None]),
    *([{"role": "user", "content": "a"}], [["a", None]], [[None, "b"]], [["a", 1]]),
    *([["a", "b"], ["", "c"]], [["  ", "b"]], [["a", "\udfff"]], [["\ud83d", "b"]]),
]


# ids: the repr of an iterator has its address, which is another one in each worker.
@pytest.mark.parametrize("history", BAD_HISTORIES, ids=lambda history: repr(history).split(" at 0x")[0])
def test_malformed_history_is_refused(nano, card, generated, history):
    with pytest.raises(ChatError, match="history"):
        helpers.chat(*nano, card, "你好", history)
    assert generated == []


@pytest.mark.parametrize("meta", [None, "苏梦远", {}, {"bot_name": ""}, {"bot_name": "\ud800"}], ids=repr)
def test_bad_persona_is_refused(nano, generated, meta):
    with pytest.raises(CharacterError):
        helpers.chat(*nano, meta, "你好")
    assert generated == []


def test_dict_card_and_session_meta_give_the_same_prompt(nano, generated):
    for meta in (META, helpers.SessionMeta(**META), helpers.CharacterCard(**META, greeting="你来了")):
        helpers.chat(*nano, meta, "你好", **GREEDY)
    prompts = [prompt for prompt, _, _ in generated]
    assert prompts[0] == prompts[1] == prompts[2]


# --- streaming


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_stream_grows_to_the_reply_of_chat(nano, card, seed):
    sampled = {"seed": seed, "max_new_tokens": 20, "min_new_tokens": 10}
    texts = list(helpers.stream_chat(*nano, card, "讲个故事吧", **sampled))
    assert len(texts) > 3
    assert all(later.startswith(earlier) and later != earlier for earlier, later in zip(texts, texts[1:]))
    assert texts[-1] == helpers.chat(*nano, card, "讲个故事吧", **sampled)[0]


@pytest.mark.parametrize("text", NOT_ASCII)
def test_no_text_shows_half_a_character(nano, text):
    tokenizer = nano[1]
    ids = text_ids(tokenizer, text)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert any(piece.startswith("<0x") for piece in pieces), "needs byte tokens to mean anything"
    for cut in range(len(ids) + 1):
        texts = list(decode_growing(tokenizer, ([token] for token in ids[:cut])))
        assert all(text.startswith(shown) for shown in texts)
        assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:]))
    assert texts[-1] == text == decode_reply(tokenizer, ids)


def test_any_tokens_at_all_give_growing_valid_text(nano):
    """A model may say bytes that are no character. What has been shown must not change or vanish even then."""
    tokenizer, rng = nano[1], random.Random(0)
    bytes_and_some_text = [i for i in range(3, 259) if i != 13] * 3 + list(range(259, 600)) + [0, 1, 4090, 4095]
    for _ in range(200):
        ids = rng.choices(bytes_and_some_text, k=rng.randint(1, 30))
        texts = list(decode_growing(tokenizer, ([token] for token in ids)))
        assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:]))
        assert texts[-1] == decode_reply(tokenizer, ids)
        assert not any("\ufffd" in text for text in texts)
        "".join(texts).encode("utf-8")


def test_a_stream_gives_the_text_of_all_its_bytes(nano):
    """However the ids are cut: half characters, control tokens and ids without a piece among them."""
    model, tokenizer = nano
    rng, special = random.Random(0), set(tokenizer.all_special_ids)
    emoji = [token for text in NOT_ASCII for token in text_ids(tokenizer, text)]
    pool = [*range(3, 259), *special, *emoji * 3, *range(300, 500), len(tokenizer), model.config.vocab_size - 1]
    pool = [token for token in pool if token not in STOP_IDS]
    for _ in range(200):
        ids = rng.choices(pool, k=40)
        pieces = tokenizer.convert_ids_to_tokens([token for token in ids if token not in special])
        expected = b"".join(map(piece_bytes, filter(None, pieces))).decode("utf-8", errors="ignore").strip()
        cuts = sorted(rng.sample(range(40), 5))
        parts = [ids[start:end] for start, end in zip([0, *cuts], [*cuts, 40])]
        decoder = StreamDecoder(tokenizer)
        texts = [decoder.add(part) for part in parts]
        assert texts[-1] == expected == decode_reply(tokenizer, ids)


def test_control_tokens_and_padding_ids_are_not_shown(nano):
    model, tokenizer = nano
    control = [token for token in tokenizer.all_special_ids if token != 2]
    padding = list(range(len(tokenizer), model.config.vocab_size))
    assert len(control) == 7
    assert padding
    ids = text_ids(tokenizer, "好的")
    assert decode_reply(tokenizer, [*control, *ids, *padding, *control]) == "好的"


def test_decode_equals_the_tokenizer_on_whole_texts(nano):
    tokenizer = nano[1]
    dialogues = [text for d in load_dialogues()[::50] for entry in d.history for text in entry]
    for text in [*dialogues, *NOT_ASCII, "a  b   c", "<0x0A> 字面", "[gMASK]sop</s>"]:
        ids = text_ids(tokenizer, text)
        assert decode_reply(tokenizer, ids) == tokenizer.decode(ids).strip() == text.strip()


@pytest.mark.parametrize("text", [*NOT_ASCII, "</s> [gMASK] sop <sop><eop> <|user|> <0x0A> [陆星辰]"])
def test_any_text_round_trips_through_chat(nano, card, generated, text):
    model, tokenizer = nano
    with says(model, text_ids(tokenizer, text)):
        texts = list(helpers.stream_chat(model, tokenizer, card, text, do_sample=False, repetition_penalty=1.0))
    assert texts[-1] == text
    assert all(text.startswith(shown) for shown in texts)
    helpers.chat(model, tokenizer, card, "然后呢", [[text, text]], **GREEDY)
    prompt = generated[-1][0]
    assert tokenizer.decode(prompt, skip_special_tokens=True).count(text) == 2
    assert sum(token in tokenizer.all_special_ids for token in prompt) == 2, "only [gMASK] and <sop>"


@pytest.fixture
def passes_at_stop(monkeypatch):
    """The number of forward passes at the moment a reply is first told to stop."""
    counts, stop = [], Reply.stop

    def record(self):
        stop(self)
        counts.append(len(counts.forwards))

    counts = type("Counts", (list,), {"forwards": []})()
    monkeypatch.setattr(Reply, "stop", record)
    return counts


def test_a_reply_stopped_before_its_turn_computes_nothing(nano):
    reply = Reply(nano[0], [100, 101], GenerationConfig(max_new_tokens=5), PromptCache())
    reply.stop()
    with each_forward(nano[0], slow(0)) as forwards:
        assert list(reply.start()) == []
    assert forwards == []
    assert reply.statistics() == {}


def test_stop_works_within_one_token(nano, session, passes_at_stop, running):
    with each_forward(nano[0], slow()) as passes_at_stop.forwards:
        for number, _ in enumerate(session.stream("讲个很长的故事", **ENDLESS)):
            if number == 3:
                session.stop()
        assert len(passes_at_stop.forwards) <= passes_at_stop[0] + 1 < LONG
    assert running() == []


def test_closing_the_iterator_stops_within_one_token(nano, card, passes_at_stop, running):
    with each_forward(nano[0], slow()) as passes_at_stop.forwards:
        texts = helpers.stream_chat(*nano, card, "讲个很长的故事", **ENDLESS)
        next(texts), next(texts)
        texts.close()
        assert len(passes_at_stop.forwards) <= passes_at_stop[0] + 1 < LONG
    assert running() == []


def test_abandoned_iterator_stops_when_collected(nano, session, running):
    with each_forward(nano[0], slow()) as forwards:
        cycle = [session.stream("讲个很长的故事", **ENDLESS)]
        next(cycle[0])
        cycle.append(cycle)
        del cycle
        gc.collect()
        assert running() == []
        assert len(forwards) < LONG
    assert session.send("还在吗")


def test_iterator_collected_in_its_own_reply_thread(nano, session, monkeypatch, running):
    problems = []
    monkeypatch.setattr(sys, "unraisablehook", problems.append)
    dropped = threading.Event()

    def collect(number, input_ids):
        time.sleep(0.005)
        if dropped.is_set():
            gc.collect()

    gc.disable()
    try:
        with each_forward(nano[0], collect) as forwards:
            cycle = [session.stream("讲个很长的故事", **ENDLESS)]
            next(cycle[0])
            cycle.append(cycle)
            del cycle
            dropped.set()
            wait_until(lambda: not running())
            assert len(forwards) < LONG
    finally:
        gc.enable()
    assert problems == []


def test_iterator_left_alone_blocks_nobody(nano, session, running):
    texts = session.stream("你好", **GREEDY)
    first = next(texts)
    wait_until(lambda: not running())
    assert session.history[-1][0] == "你好"
    reply = session.history[-1][1]
    assert reply.startswith(first)
    session.send("再说一句")
    assert [query for query, _ in session.history[1:]] == ["你好", "再说一句"]
    assert [first, *texts][-1] == reply


@pytest.mark.slow
def test_program_that_leaves_an_iterator_unread_ends_well(run_command):
    script = """if True:
        import helpers
        chat = helpers.stream_chat(*helpers.load("nano", device_map="cpu"), helpers.get_character("苏梦远"), "你好",
                                   min_new_tokens=1500, max_new_tokens=1500)
        next(chat)
        print("done")
    """
    result = run_command("-c", script, timeout=120)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


def test_two_iterators_started_in_turn_lose_nothing(session):
    first, second = session.stream("一"), session.stream("二")
    again = session.stream_again()
    list(first), list(second), list(again)
    assert [query for query, _ in session.history[1:]] == ["一", "二"]


def test_error_in_the_model_reaches_the_caller_and_the_session_goes_on(nano, card, session, running):
    session.send("你好")
    before = session.export()

    def fail(number, input_ids):
        if number == 4:
            raise RuntimeError("CUDA out of memory")

    with each_forward(nano[0], fail), pytest.raises(RuntimeError, match="out of memory"):
        session.send("讲个故事", **ENDLESS)
    with each_forward(nano[0], fail), pytest.raises(RuntimeError, match="out of memory"):
        session.regenerate(**ENDLESS)
    assert session.export() == before
    assert running() == []
    assert session.send("再来") == helpers.chat(*nano, card, "再来", before["history"], **GREEDY)[0]


def test_error_between_two_layers_leaves_no_lopsided_cache(nano, card, session):
    """Then some layers have taken a token into their cache and others have not."""
    session.send("你好")
    past = [list(entry) for entry in session.history]
    passes = []

    def fail(module, args):
        passes.append(1)
        if len(passes) == 4:
            raise RuntimeError("CUDA out of memory")

    handle = nano[0].model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        session.send("讲个故事", **ENDLESS)
    handle.remove()
    assert session.send("再来") == helpers.chat(*nano, card, "再来", past, **GREEDY)[0]


def test_keyboard_interrupt_keeps_what_there_is(nano, session, interruptible, running):
    main = threading.main_thread().ident

    def interrupt(number, input_ids):
        time.sleep(0.01)
        if number == 5:
            signal.pthread_kill(main, signal.SIGINT)

    with each_forward(nano[0], interrupt) as forwards, pytest.raises(KeyboardInterrupt):
        session.send("讲个很长的故事", **ENDLESS)
    assert running() == []
    assert len(forwards) < LONG
    assert session.history[-1][0] == "讲个很长的故事"
    assert session.history[-1][1]
    assert session.send("还在吗")


# --- seeds and threads


def test_seed_repeats_and_seeds_differ(nano, card):
    wild = {"temperature": 2.0, "max_new_tokens": 15}  # at its own settings Nano is nearly sure of what it says
    replies = [helpers.chat(*nano, card, "讲个故事", seed=seed, **wild)[0] for seed in (1, 2, 3, 1, 2, 3)]
    assert replies[:3] == replies[3:]
    assert len(set(replies)) > 1


def test_seed_leaves_the_global_random_state_alone(nano, card):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    helpers.chat(*nano, card, "你好", seed=5, max_new_tokens=5)
    assert torch.equal(torch.get_rng_state(), before)
    texts = helpers.stream_chat(*nano, card, "你好", seed=5, max_new_tokens=400, min_new_tokens=400)
    next(texts)
    texts.close()
    assert torch.equal(torch.get_rng_state(), before)
    helpers.chat(*nano, card, "你好", max_new_tokens=5)
    assert not torch.equal(torch.get_rng_state(), before), "without a seed the global generator is used"


def test_threads_with_seeds_are_each_repeatable(nano, card):
    def reply(seed):
        return helpers.chat(*nano, card, "讲个故事", seed=seed, max_new_tokens=15, min_new_tokens=15)[0]

    alone = {seed: reply(seed) for seed in (11, 12, 13)}
    together = {}
    threads = [threading.Thread(target=lambda s=seed: together.update({s: reply(s)})) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_stop_while_another_conversation_has_its_turn(nano, card, session, running):
    with each_forward(nano[0], slow(0.05)):
        other = helpers.stream_chat(*nano, card, "讲个很长的故事", **ENDLESS)
        next(other)
        waiting = threading.Thread(target=lambda: session.send("你好"))
        waiting.start()
        wait_until(lambda: len(running()) == 2)
        session.stop()
        wait_until(lambda: not waiting.is_alive())
        assert len(running()) == 1, "the other conversation was still going on"
        other.close()
    assert session.history[-1] == ["你好", ""]


# --- sessions


def test_session_begins_with_the_greeting(nano, card):
    assert card.greeting
    assert helpers.ChatSession(*nano, card).history == [["", card.greeting]]
    assert helpers.ChatSession(*nano, {**META, "greeting": "你来了"}).history == [["", "你来了"]]
    assert helpers.ChatSession(*nano, META).history == []


def persona_change(session):
    session.set_persona({**META, "bot_info": "退休的船长，爱讲海上的故事"})


CHANGES = {
    2: helpers.ChatSession.undo,
    4: lambda session: session.edit(response="我改主意了，明天再说吧"),
    6: persona_change,
    7: lambda session: session.edit(query="换一个问题"),
    8: lambda session: (session.undo(), session.undo()),
    10: lambda session: session.edit(query="再换一个", response="好，换就换"),
}
QUESTIONS = ["你好呀", "最近忙什么", "写歌了吗", "今天天气不错", "一起吃饭吧", "你害怕什么", "讲个笑话"]


def test_greedy_session_equals_fresh_encoding(nano, card, generated):
    """The kept KV cache must change nothing but the time: same replies, far fewer tokens computed."""
    short = {"do_sample": False, "max_new_tokens": 6}
    session = helpers.ChatSession(*nano, card, **short)
    for turn in range(12):
        if turn in CHANGES:
            CHANGES[turn](session)
        past = [list(entry) for entry in session.history]
        query = f"{QUESTIONS[turn % 7]}，第{turn}次"
        with each_forward(nano[0], slow(0)) as fed:
            reply = session.send(query)
        assert reply == helpers.chat(*nano, session.session_meta, query, past, **short)[0], f"turn {turn}"
        assert session.history == [*past, [query, reply]]
        assert generated[-1][0] == generated[-2][0], "session and chat had different prompts"
        if turn not in (0, 6):  # a new persona changes the prompt from its beginning
            assert fed[0] < 100 and fed[0] < len(generated[-1][0]) / 2, f"turn {turn}: {fed[0]} tokens computed"
        if turn % 5 == 4:
            check_regenerate(nano, session, past, query)
    assert len(session.history) == 1 + 12 - 3


def check_regenerate(nano, session, past, query):
    other = {"do_sample": False, "max_new_tokens": 15, "repetition_penalty": 1.0}
    with each_forward(nano[0], slow(0)) as fed:
        reply = session.regenerate(**other)
    assert fed[0] == 1, "only the last prompt token has to be computed again"
    assert reply == helpers.chat(*nano, session.session_meta, query, past, **other)[0]
    assert session.history == [*past, [query, reply]]


def test_statistics_describe_the_last_reply(session, generated):
    session.send("你好", min_new_tokens=3)
    prompt, _, reply = generated[-1]
    statistics = session.statistics
    assert (statistics["prompt_tokens"], statistics["new_tokens"]) == (len(prompt), len(reply))
    assert 0 < statistics["time_to_first_token"] < 60
    assert statistics["tokens_per_second"] > 0


def test_undo_edit_and_regenerate_need_something(nano, session):
    for action in (session.undo, session.regenerate, lambda: session.edit(query="你好")):
        with pytest.raises(ChatError, match="no exchange yet"):
            action()
    session.edit(response="换个开场白")
    assert session.history == [["", "换个开场白"]]
    with pytest.raises(ChatError, match="nothing to edit"):
        helpers.ChatSession(*nano, META).edit(response="x")


@pytest.mark.parametrize("change", [{"query": ""}, {"query": 5}, {"response": " "}, {"response": "\ud800"}])
def test_bad_edit_changes_nothing(session, change):
    session.history.append(["你好", "你好呀"])
    with pytest.raises(ChatError):
        session.edit(**{"query": "好的", "response": "好", **change})
    assert session.history[-1] == ["你好", "你好呀"]


def test_undo_returns_the_query(session, card):
    session.send("你好")
    assert session.undo() == "你好"
    assert session.history == [["", card.greeting]]


def test_any_exchange_can_be_edited_and_deleted(session, card):
    session.history += [["一", "甲"], ["二", "乙"], ["三", "丙"]]
    session.edit(query="壹", index=1)
    session.delete(2)
    assert session.history == [["", card.greeting], ["壹", "甲"], ["三", "丙"]]
    session.delete(1, following=True)
    assert session.history == [["", card.greeting]]
    with pytest.raises(ChatError, match="no such exchange"):
        session.delete(1)


def test_deleting_an_earlier_exchange_keeps_the_alternatives_of_the_last(session):
    session.send("一")
    session.send("二")
    session.regenerate(temperature=2.0)
    both = session.alternatives
    session.delete(1)
    assert session.alternatives == both and session.history[-1][0] == "二"
    session.delete(1)
    assert session.alternatives == [session.history[-1][1]], "only the greeting is left"


def test_a_reply_goes_on_where_it_ends(nano, session, generated):
    model, tokenizer = nano
    with says(model, text_ids(tokenizer, "我们")):
        session.send("唱什么？")
    with says(model, text_ids(tokenizer, "一起唱歌")):
        reply = session.begin_more()
        reply.wait()
    assert reply.error is None
    assert session.history[-1] == ["唱什么？", "我们一起唱歌"]
    assert session.alternatives == ["我们", "我们一起唱歌"]
    assert tokenizer.decode(reply.input_ids).endswith("]我们"), "no newline between what there was and what comes"


def test_a_reply_cannot_go_on_before_there_is_one(session):
    with pytest.raises(ChatError, match="no exchange yet"):
        session.begin_more()


@pytest.mark.parametrize("longer", ["bot_info", "user_info"])
def test_cut_persona_fits_and_wastes_nothing(nano, longer):
    tokenizer = nano[1]

    def length(meta):
        return len(encode_turns(tokenizer, meta, [[{"role": "user", "content": ""}]]))

    meta = helpers.SessionMeta(
        **{"bot_name": "甲", "bot_info": "爱哭。", "user_name": "乙", longer: "爱写诗，也爱唱歌。" * 200}
    )
    cut = cut_persona(tokenizer, meta, 300)
    assert 290 < length(cut) <= 300
    assert getattr(meta, longer).startswith(getattr(cut, longer)) and cut.user_name == "乙"
    assert cut_persona(tokenizer, cut, 300) == cut


def test_a_prompt_that_is_too_long_says_by_how_much(nano, card):
    with pytest.raises(PromptTooLongError, match="prompt too long") as caught:
        helpers.chat(*nano, card.model_copy(update={"bot_info": "长" * 9000}), "你好")
    error = caught.value
    assert error.total > error.persona > error.context == nano[0].config.max_position_embeddings


def test_clear_begins_anew(session, card):
    session.send("你好")
    session.clear()
    assert session.history == [["", card.greeting]]
    assert session.statistics == {}


def test_bad_persona_leaves_the_old_one(session, card):
    with pytest.raises(CharacterError, match="bot_name"):
        session.set_persona({"bot_name": ""})
    assert session.session_meta == card


def test_busy_session_refuses_and_loses_nothing(nano, card, session):
    """While a reply is written, a second one from another thread, and every change, is refused at once."""
    refused, go_on = [], threading.Event()

    def second():
        try:
            session.send("我也要说")
        except BusyError as error:
            refused.append(error)

    changes = [session.undo, session.clear, session.regenerate, lambda: session.edit(response="x")]
    changes.append(lambda: session.set_persona(META))
    longer = {**GREEDY, "min_new_tokens": 12}
    expected = helpers.chat(*nano, card, "你好", session.history, **longer)[0]
    with each_forward(nano[0], lambda number, input_ids: number < 3 or go_on.wait(60)):
        texts = session.stream("你好", **longer)
        next(texts)
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        for change in changes:
            with pytest.raises(BusyError, match="busy"):
                change()
        go_on.set()
        reply = list(texts)[-1]
    assert len(refused) == 1
    assert reply == expected
    assert session.history == [["", card.greeting], ["你好", expected]]


def test_many_threads_at_once_lose_nothing(nano, session):
    outcomes, together = [], threading.Barrier(8)

    def send(number):
        together.wait()
        try:
            outcomes.append(session.send(f"第{number}个人说", min_new_tokens=12))
        except BusyError:
            outcomes.append(None)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    with each_forward(nano[0], slow(0.05)):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    said = [outcome for outcome in outcomes if outcome is not None]
    assert len(outcomes) == 8
    assert sorted(said) == sorted(response for _, response in session.history[1:])
    assert len(said) < 8


def test_stop_keeps_the_partial_reply(nano, card, session):
    with each_forward(nano[0], slow()):
        for text in session.stream("讲个很长的故事", **ENDLESS):
            if len(text) > 3:
                session.stop()
    assert session.history == [["", card.greeting], ["讲个很长的故事", text]]
    past = [list(entry) for entry in session.history]
    assert session.send("继续") == helpers.chat(*nano, card, "继续", past, **GREEDY)[0]


def test_stop_from_another_thread_ends_send(nano, session):
    with each_forward(nano[0], slow()) as forwards:
        other = threading.Thread(target=lambda: (wait_until(lambda: len(forwards) > 3), session.stop()))
        other.start()
        reply = session.send("讲个很长的故事", **ENDLESS)
        other.join()
        assert len(forwards) < LONG
    assert session.history[-1] == ["讲个很长的故事", reply]


def test_stop_without_a_reply_does_nothing(nano, card, session):
    session.stop()
    first = session.send("你好")
    session.stop()
    assert first == helpers.chat(*nano, card, "你好", session.history[:1], **GREEDY)[0]
    assert session.send("你好", min_new_tokens=5)


# --- in the background


def test_a_reply_grows_in_the_background(nano, card, session):
    assert session.draft is None
    with each_forward(nano[0], slow()):
        reply, drafts = session.begin("你好", min_new_tokens=12), []
        while not reply.wait(0.005):
            drafts += [session.draft] if session.draft else []
    texts = [text for _, _, text in drafts]
    assert len(set(texts)) > 3
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:]))
    assert {(str(past), query) for past, query, _ in drafts} == {(str([["", card.greeting]]), "你好")}
    assert session.draft is None and session.history[-1][1].startswith(texts[-1])


def test_another_reply_in_the_background_takes_the_place_of_the_last(session):
    first = session.send("你好")
    session.begin_again(do_sample=True, temperature=2.0, seed=1).wait()
    assert session.alternatives[0] == first and len(session.alternatives) == 2
    with pytest.raises(ChatError, match="empty text"):
        session.begin(" ")


def test_why_a_reply_failed_is_known_until_the_conversation_goes_on(nano, session):
    def fail(number, input_ids):
        raise RuntimeError("broken")

    with each_forward(nano[0], fail):
        session.begin("你好").wait()
    assert str(session.error) == "broken" and session.draft is None and len(session.history) == 1
    session.send("还在吗")
    assert session.error is None


# --- alternatives


def regenerate_three(session):
    """A session with three different replies to 你好."""
    replies = [session.send("你好", min_new_tokens=3)]
    replies += [session.regenerate(do_sample=True, temperature=2.0, seed=seed) for seed in (1, 2)]
    assert len(set(replies)) == 3, "the test needs three different replies"
    return replies


def test_regenerate_keeps_the_old_replies_and_swipe_shows_them(session, card):
    replies = regenerate_three(session)
    assert (session.alternatives, session.alternative) == (replies, 2)
    for step, shown in [(-1, 1), (-1, 0), (-1, 0), (1, 1), (5, 2), (1, 2), (-2, 0)]:
        assert session.swipe(step) == replies[shown]
        assert session.history == [["", card.greeting], ["你好", replies[shown]]]
        assert (session.alternatives, session.alternative) == (replies, shown)
    fourth = session.regenerate(do_sample=True, temperature=2.0, seed=3)
    assert (session.alternatives, session.alternative) == ([*replies, fourth], 3)


def test_next_reply_follows_the_shown_alternative(nano, session, generated):
    replies = regenerate_three(session)
    session.swipe(-1)
    session.send("然后呢")
    prompt = nano[1].decode(generated[-1][0])
    assert f"]{replies[1]}\n" in prompt
    assert replies[2] not in prompt


@pytest.mark.parametrize(
    "change, alternatives",
    [
        (lambda session: session.send("再说"), lambda session: [session.history[-1][1]]),
        (lambda session: session.undo(), lambda session: [session.session_meta.greeting]),
        (lambda session: session.clear(), lambda session: [session.session_meta.greeting]),
        (lambda session: session.set_persona(META), lambda session: [session.history[-1][1]]),
    ],
    ids=["send", "undo", "clear", "persona"],
)
def test_alternatives_belong_to_one_query_and_persona(session, change, alternatives):
    regenerate_three(session)
    session.swipe(-1)
    change(session)
    assert session.alternatives == alternatives(session)
    assert session.alternative == 0


def test_edit_changes_the_shown_alternative(session):
    first, _, third = regenerate_three(session)
    session.swipe(-1)
    session.edit(query="您好", response="改过")
    assert (session.alternatives, session.alternative) == ([first, "改过", third], 1)
    session.swipe()
    assert session.history[-1] == ["您好", third]


def test_stopped_reply_is_an_alternative(nano, session):
    first = session.send("你好")
    with each_forward(nano[0], slow()):
        for text in session.stream_again(**ENDLESS):
            if len(text) > 3:
                session.stop()
    assert session.alternatives == [first, text]


def test_failed_regenerate_keeps_the_alternatives(nano, session):
    replies = regenerate_three(session)
    session.swipe(-1)

    def fail(number, input_ids):
        raise RuntimeError("broken")

    with each_forward(nano[0], fail), pytest.raises(RuntimeError, match="broken"):
        session.regenerate()
    assert (session.alternatives, session.alternative) == (replies, 1)


def test_nothing_to_swipe(nano, session):
    with pytest.raises(ChatError, match="no exchange yet"):
        session.swipe()
    assert helpers.ChatSession(*nano, META).alternatives == []


# --- parameters between replies


def test_set_generation_holds_for_the_next_replies(session, generated):
    session.set_generation(max_new_tokens=3, min_new_tokens=3)
    session.send("你好")
    session.set_generation(max_new_tokens=4)
    session.send("你好")
    assert [(len(reply), config.do_sample) for _, config, reply in generated] == [(3, False), (4, False)]
    assert (session.parameters.max_new_tokens, session.parameters.min_new_tokens) == (4, 3)


@pytest.mark.parametrize("bad", [{"temperature": 0}, {"temprature": 1.0}, {"min_new_tokens": 13}, {"top_p": "x"}])
def test_senseless_parameters_change_nothing(session, bad):
    before = dict(session.generation)
    with pytest.raises(ChatError):
        session.set_generation(top_k=7, **bad)
    assert session.generation == before


def test_parameters_name_what_the_model_sets_itself(nano, session):
    own = model_defaults(nano[0])
    assert session.parameters.temperature == own["temperature"] != GenerationParameters().temperature


def test_moving_a_parameter_does_not_disturb_a_reply(nano, session, generated):
    with each_forward(nano[0], lambda number, input_ids: number == 3 and session.set_generation(max_new_tokens=5)):
        session.send("你好", min_new_tokens=12)
    assert len(generated[0][2]) == 12
    assert session.parameters.max_new_tokens == 5


def test_context_used_is_the_next_prompt_without_its_words(nano, session, generated):
    for query in ("你好", "然后呢"):
        used, limit = session.context_used()
        session.send(query)
        words = len(nano[1](query, add_special_tokens=False)["input_ids"])
        # the boundary between name and words may be cut into tokens differently
        assert abs(used + words - len(generated[-1][0])) <= 2
    assert session.context_used()[0] > used
    assert limit == nano[0].config.max_position_embeddings
    session.set_generation(max_length=300)
    assert session.context_used()[1] == 300
    assert helpers.ChatSession(*nano, {"bot_name": "甲"}).context_used()[0] < 40


# --- the context


@pytest.fixture
def small_context(nano, monkeypatch):
    monkeypatch.setattr(nano[0].config, "max_position_embeddings", 400)
    return 400


def test_long_conversation_drops_the_oldest_and_says_so(nano, card, session, generated, small_context):
    growths = 0
    for turn in range(24):
        before = session.dropped_turns
        with warnings.catch_warnings(record=True) as caught, each_forward(nano[0], slow(0)) as fed:
            session.send(f"第{turn}次问你，今天想聊点什么呢")
        grown = session.dropped_turns > before
        growths += grown
        assert [w.category for w in caught] == [helpers.ContextWarning] * grown, f"turn {turn}"
        check_prompt(nano[1], generated[-1], card, session, small_context)
        if turn and not grown:
            assert fed[0] < 80, "the kept prompt begins the same, so the cache must serve"
    assert 2 <= growths <= 12
    assert len(session.history) == 25, "nothing is lost from the history itself"


def check_prompt(tokenizer, call, card, session, context):
    prompt, _, reply = call
    text = tokenizer.decode(prompt, skip_special_tokens=True)
    assert len(prompt) + len(reply) <= context
    assert card.bot_info in text and card.user_info in text
    queries = [query for query, _ in session.history]
    kept = [query for query in queries if query and f"]{query}\n" in text]
    assert kept == [query for query in queries[session.dropped_turns :] if query]
    assert kept[-1] == queries[-1]


def test_chat_with_a_long_history_warns_and_keeps_it_all(nano, card, small_context):
    history = [[f"第{n}次问你，今天想聊点什么呢", "聊聊音乐吧，我新写了一首歌"] for n in range(30)]
    with pytest.warns(helpers.ContextWarning, match=r"context full.*轮"):
        response, new_history = helpers.chat(*nano, card, "你好", history, **GREEDY)
    assert new_history == [*history, ["你好", response]]


def test_second_conversation_warns_too(nano, card, small_context):
    history = [[f"第{n}次问你，今天想聊点什么呢", "聊聊音乐吧，我新写了一首歌"] for n in range(30)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # Python's own: a text is shown once a place
        for _ in range(2):
            session = helpers.ChatSession(*nano, card, **GREEDY)
            session.history += history
            session.send("你好")
    assert len(caught) == 2


def test_undo_takes_a_drop_back(session, nano, small_context):
    while not session.dropped_turns:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session.send("说点什么吧，什么都可以，越长越好")
    session.undo()
    session.undo()
    session.send("好")
    assert session.dropped_turns == 0


def test_persona_and_query_too_long(nano, card, session, generated, small_context):
    before = session.export()
    with pytest.raises(ChatError, match="prompt too long"):
        session.send("很长" * 400)
    with pytest.raises(ChatError, match="prompt too long"):
        helpers.chat(*nano, {**META, "bot_info": "很长" * 400}, "你好")
    assert session.export() == before
    assert generated == []


def test_max_length_counts_prompt_and_reply(nano, card, generated):
    with says(nano[0], [100] * 500):
        helpers.chat(*nano, card, "你好", do_sample=False, repetition_penalty=1.0, max_length=250)
    prompt, _, reply = generated[-1]
    assert len(prompt) + len(reply) == 250
    with pytest.raises(ChatError, match="prompt too long"):
        helpers.chat(*nano, card, "你好", max_length=20)


def test_reply_ends_where_the_context_ends(nano, card, generated, small_context):
    with says(nano[0], [100] * 500):
        helpers.chat(*nano, card, "你好", do_sample=False, repetition_penalty=1.0)
    prompt, _, reply = generated[-1]
    assert len(prompt) + len(reply) == small_context


def test_one_short_limit_does_not_make_the_session_forget(nano, session):
    session.history += [[f"问题{n}，说说你的看法", "我觉得挺好的，就这样吧"] for n in range(10)]
    with pytest.warns(helpers.ContextWarning):
        session.send("你好", max_length=240)
    assert session.dropped_turns > 0
    session.send("你好")
    assert session.dropped_turns == 0


def test_fitting_drops_no_more_than_it_must(nano, card):
    tokenizer = nano[1]
    history = [[f"第{n}次", "好的呀" * (1 + n % 3)] for n in range(40)]

    def length(start):
        return len(encode_prompt(tokenizer, card, "你好", history[start:]))

    def fit(limit, dropped=0):
        return fit_turns(tokenizer, card, build_turns("你好", history), limit, dropped)

    limit = length(10)
    ids, dropped = fit(limit)
    assert length(dropped) == len(ids) <= limit * 3 // 4 < length(dropped - 1)
    assert fit(limit, dropped=12)[1] == 12, "a drop is kept while it fits"
    assert fit(limit, dropped=39)[1] == dropped, "too much was dropped"
    assert fit(length(0), dropped=12)[1] == 0, "all of it fits"


def test_common_prefix_length():
    assert common_prefix_length([], [1]) == 0
    assert common_prefix_length([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix_length([1, 2], [1, 2, 3]) == common_prefix_length([1, 2, 3], [1, 2]) == 2


# --- export


def test_export_and_restore_after_json(nano, card):
    session = helpers.ChatSession(*nano, card, **GREEDY)
    session.send("你好😀")
    exported = json.loads(json.dumps(session.export(), ensure_ascii=False))
    restored = helpers.ChatSession.restore(*nano, exported)
    assert restored.export() == session.export()
    assert restored.session_meta == card
    assert restored.send("然后呢") == session.send("然后呢")
    restored.clear()
    assert restored.history == [["", card.greeting]]


def test_export_keeps_the_alternatives(nano, session):
    replies = regenerate_three(session)
    session.swipe(-1)
    restored = helpers.ChatSession.restore(*nano, json.loads(json.dumps(session.export())))
    assert (restored.alternatives, restored.alternative) == (replies, 1)
    assert restored.swipe() == replies[2]


def test_older_export_without_alternatives(nano, session):
    session.send("你好")
    older = {key: value for key, value in session.export().items() if not key.startswith("alternative")}
    restored = helpers.ChatSession.restore(*nano, older)
    assert restored.export() == session.export()


def test_restore_without_a_greeting(nano):
    session = helpers.ChatSession(*nano, META, **GREEDY)
    session.history.append(["在吗", "在的"])
    restored = helpers.ChatSession.restore(*nano, json.loads(json.dumps(session.export())))
    assert restored.history == [["在吗", "在的"]]
    assert restored.session_meta == helpers.SessionMeta(**META)


def test_export_is_a_copy(session):
    exported = session.export()
    exported["history"][0][1] = "改了"
    exported["generation"]["do_sample"] = True
    assert session.history[0][1] != "改了"
    assert session.generation["do_sample"] is False


@pytest.mark.parametrize(
    "damage, error",
    [
        (lambda e: None, ChatError),
        (lambda e: [e], ChatError),
        (lambda e: {**e, "format": "other/9"}, ChatError),
        (lambda e: {k: v for k, v in e.items() if k != "format"}, ChatError),
        (lambda e: {k: v for k, v in e.items() if k != "history"}, ChatError),
        (lambda e: {**e, "history": "你好"}, ChatError),
        (lambda e: {**e, "history": [["a"]]}, ChatError),
        (lambda e: {**e, "history": [["a", 5]]}, ChatError),
        (lambda e: {**e, "alternatives": "你好"}, ChatError),
        (lambda e: {**e, "alternatives": ["别的"]}, ChatError),
        (lambda e: {**e, "alternatives": [*e["alternatives"], 5]}, ChatError),
        (lambda e: {**e, "alternative": 1}, ChatError),
        (lambda e: {**e, "alternative": -1}, ChatError),
        (lambda e: {**e, "alternative": "0"}, ChatError),
        (lambda e: {**e, "generation": []}, ChatError),
        (lambda e: {**e, "generation": {"temperature": 0}}, ChatError),
        (lambda e: {**e, "generation": {"model": "x"}}, ChatError),
        (lambda e: {**e, "session_meta": None}, CharacterError),
        (lambda e: {**e, "session_meta": {**e["session_meta"], "bot_name": ""}}, CharacterError),
        (lambda e: {**e, "session_meta": {**e["session_meta"], "greeting": 5}}, CharacterError),
    ],
)
def test_damaged_export_is_refused(nano, session, damage, error):
    with pytest.raises(error):
        helpers.ChatSession.restore(*nano, damage(session.export()))


def test_markdown(nano):
    session = helpers.ChatSession(*nano, {**META, "greeting": "你来了"})
    session.history += [["第一行\n\n第二行", "好"], ["然后呢", ""]]
    assert session.to_markdown().split("\n\n") == [
        "**苏梦远**：你来了",
        "**陆星辰**：第一行  第二行",
        "**苏梦远**：好",
        "**陆星辰**：然后呢",
    ]


def test_a_greeting_is_the_bots_line(nano):
    prompt = nano[1].decode(encode_prompt(nano[1], META, "在吗", [["", "你来了"]]))
    assert "[苏梦远]你来了\n[陆星辰]在吗" in prompt.replace("] ", "]")


def test_parameters_are_documented():
    undocumented = [name for name, field in GenerationParameters.model_fields.items() if not field.description]
    assert undocumented == []
