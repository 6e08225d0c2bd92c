"""The engine on CharacterGLM-Nano in float32: the tokens of `generate`, whatever else is in the batch, and no way to
stop it. Hooks on the real model slow it down or make it fail; everything else is the real thing."""

import asyncio
import gc
import json
import shutil

import pytest
import torch
from live_server import ask, before_forward, endless, nano_server, one_at_a_time, openai_client, parameters, wait_for
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.generation.continuous_batching.requests import RequestState

import helpers
from helpers.chat.fitting import encode_prompt
from helpers.errors import ChatError, EngineError, OverloadError
from helpers.model.adapters import ADAPTER_CARD
from helpers.serving.engine import PAGE_TOKENS, Engine, Generation
from helpers.serving.service import Service

SAMPLED = {"temperature": 0.9, "top_p": 0.8, "top_k": 50, "repetition_penalty": 1.3}
QUERIES = ["你好呀，小苏", "你在做什么", "今天天气真好，我们出去走走吧", "1+1=?", "😀", "写一首诗", "你喜欢我吗"]
LONG = {"do_sample": False, "max_new_tokens": 500}


@pytest.fixture(scope="module")
def nano():
    return helpers.load("nano", dtype="float32", device_map="cpu")


@pytest.fixture(scope="module")
def prompts(nano):
    card = helpers.get_character("苏梦远")
    return [encode_prompt(nano[1], card, query, []) for query in QUERIES]


def with_engine(model, scenario, **options):
    """Run `scenario(engine)` with a started engine; afterwards nothing of any request is left in it."""

    async def run():
        engine = Engine(model, **options)
        await engine.start()
        try:
            result = await scenario(engine)
            await wait_for(lambda: nothing_left(engine))
            return result
        finally:
            await engine.close()

    return asyncio.run(run())


def nothing_left(engine) -> bool:
    router, processor = engine._manager.output_router, engine._manager.batch_processor
    left = router.result_handlers or router.output_queue.qsize() or processor.scheduler.active_requests
    return not (engine.in_flight or left or processor.scheduler.waiting_requests)


async def read(generation: Generation) -> list[int]:
    return [token async for piece in generation for token in piece]


async def write_all(engine, requests) -> list[list[int]]:
    """The replies to (prompt, parameters) pairs, all begun at once."""
    return await asyncio.gather(*[read(engine.generate(*request)) for request in requests])


def mixed_requests(prompts):
    """Greedy, seeded and unseeded requests with parameters of their own; the unseeded ones only keep the others company."""
    choices = [
        {"do_sample": False, "repetition_penalty": 1.0},
        {"do_sample": False, "repetition_penalty": 1.6},
        {**SAMPLED, "seed": 1},
        {**SAMPLED, "seed": 2, "top_k": 0, "temperature": 2.0},
        {**SAMPLED, "seed": 3, "top_p": 1.0, "repetition_penalty": 1.0},
        {**SAMPLED, "top_k": 5},
        {**SAMPLED, "seed": 4, "top_k": 3},
    ]
    return [(prompt, parameters(**chosen)) for prompt, chosen in zip(prompts, choices)]


def assert_as_alone(model, requests, replies):
    repeatable = [r for r in zip(requests, replies) if not r[0][1].do_sample or r[0][1].seed is not None]
    assert len(repeatable) >= 4
    for (prompt, chosen), reply in repeatable:
        assert reply == one_at_a_time(model, prompt, chosen)


@pytest.mark.parametrize("slots", [16, pytest.param(2, marks=pytest.mark.slow), 1])
def test_replies_are_those_of_generate(nano, prompts, slots):
    requests, at_once = mixed_requests(prompts), []

    async def scenario(engine):
        with before_forward(
            engine.model, lambda ids: at_once.append(len(engine._manager.batch_processor.scheduler.active_requests))
        ):
            return await write_all(engine, requests)

    replies = with_engine(nano[0], scenario, slots=slots)
    assert_as_alone(nano[0], requests, replies)
    assert max(at_once) == min(slots, len(requests))


@pytest.mark.slow
def test_requests_that_lose_their_cache_go_on_where_they_were(nano, prompts, monkeypatch):
    evicted, start_again = [], RequestState.create_equivalent_initial_request

    def spy(state):
        evicted.append(len(state.generated_tokens))
        return start_again(state)

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", spy)
    chosen = [{"do_sample": False, "repetition_penalty": 1.4}, {**SAMPLED, "seed": 5}, {**SAMPLED, "seed": 6}, {}]
    requests = [(prompt, parameters(**c, max_new_tokens=80)) for prompt, c in zip(prompts, [*chosen, chosen[0]])]

    async def scenario(engine):
        with endless(engine.model):
            return await write_all(engine, requests)

    replies = with_engine(nano[0], scenario, slots=5, cache_tokens=320)
    assert any(evicted), "the cache was large enough for all: the test shows nothing"
    with endless(nano[0]):
        assert_as_alone(nano[0], requests, replies)


def test_prompts_longer_than_one_pass(nano, prompts):
    long = (prompts[0] * 20)[:1500]
    requests = [(long, parameters(do_sample=False)), *mixed_requests(prompts)]
    replies = with_engine(nano[0], lambda engine: write_all(engine, requests))
    assert_as_alone(nano[0], requests, replies)


def test_a_reply_may_fill_the_whole_cache(nano, prompts):
    lengths = [192 - 1, 192 - 12, 100]

    async def scenario(engine):
        with endless(engine.model):
            endlessly = parameters(max_new_tokens=10**9)
            return [len(await read(engine.generate((prompts[0] * 4)[:n], endlessly))) for n in lengths]

    assert with_engine(nano[0], scenario, cache_tokens=192) == [192 - n for n in lengths]


def test_cancelling_frees_the_slot(nano, prompts):
    async def scenario(engine):
        with endless(engine.model, 0.05):
            running, waiting = (engine.generate(prompt, parameters(**LONG)) for prompt in prompts[:2])
            assert await anext(aiter(running))
            await asyncio.sleep(0.02)  # in the middle of the next token, which then comes for nobody
            for generation in (waiting, running):
                generation.cancel()
                generation.cancel()
            assert engine.in_flight == 0
            await wait_for(lambda: nothing_left(engine), seconds=10)
        return await read(engine.generate(prompts[2], parameters(do_sample=False)))

    reply = with_engine(nano[0], scenario, slots=1)
    assert reply == one_at_a_time(nano[0], prompts[2], parameters(do_sample=False))


def test_a_reply_nobody_reads_frees_its_slot(nano, prompts):
    async def scenario(engine):
        unread = engine.generate(prompts[0], parameters(do_sample=False))
        await wait_for(lambda: nothing_left(engine))
        return await read(unread)

    reply = with_engine(nano[0], scenario)
    assert reply == one_at_a_time(nano[0], prompts[0], parameters(do_sample=False))


def test_the_queue_is_bounded(nano, prompts):
    async def scenario(engine):
        with endless(engine.model, 0.005):
            accepted = [engine.generate(prompts[0], parameters(**LONG)) for _ in range(2)]
            prepared = engine.reserve()
            assert engine.in_flight == 3 and engine.waiting == 2
            with pytest.raises(OverloadError):
                engine.generate(prompts[0], parameters(**LONG))
            prepared.cancel()
            assert engine.in_flight == 2
            for generation in accepted:
                generation.cancel()
        return await read(engine.generate(prompts[0], parameters()))

    assert with_engine(nano[0], scenario, slots=1, queue_size=2)


def test_what_would_stop_the_engine_is_refused(nano, prompts):
    bad_prompts = [[], [-1], [4096], [10**30], [5] * 1024]
    bad_fields = [
        *({"temperature": value} for value in (0.0, float("nan"), -1.0)),
        *({"top_p": value} for value in (float("nan"), 0.0)),
        *({"top_k": -1}, {"repetition_penalty": 0.0}, {"max_new_tokens": 0}, {"seed": -1}, {"seed": 2**63}),
    ]

    async def scenario(engine):
        for ids, fields in [*((ids, {}) for ids in bad_prompts), *(([5], fields) for fields in bad_fields)]:
            with pytest.raises(ChatError):
                engine.generate(ids, parameters(**fields))
            assert engine.in_flight == 0
        assert await read(engine.generate(prompts[0], parameters()))
        assert engine.alive and engine.restarts == 0

    with_engine(nano[0], scenario, cache_tokens=1024)


def test_extreme_values_are_served(nano, prompts):
    extreme = [
        {"temperature": 1e-300},
        {"top_p": 1e-300},
        {"top_k": 10**400},
        {"top_k": 4097},
        {"repetition_penalty": 1e-300},
        {"max_new_tokens": 10**30},
    ]

    async def scenario(engine):
        requests = [(prompts[0], parameters(**fields)) for fields in extreme]
        replies = await write_all(engine, [*requests, (prompts[1], parameters(do_sample=False))])
        assert engine.alive and engine.restarts == 0
        return replies

    *replies, neighbour = with_engine(nano[0], scenario, cache_tokens=2048, context=256)
    assert all(replies)
    assert neighbour == one_at_a_time(nano[0], prompts[1], parameters(do_sample=False))


def test_scores_that_are_no_numbers_hurt_nobody_else(nano, prompts):
    def spoil_first_row(module, args, output):
        output.logits[:, 0] = torch.nan

    async def scenario(engine):
        handle = engine.model.register_forward_hook(spoil_first_row)
        try:
            await write_all(engine, [(prompts[0], parameters()), (prompts[1], parameters(seed=1))])
        finally:
            handle.remove()
        assert engine.alive and engine.restarts == 0
        return await read(engine.generate(prompts[0], parameters(do_sample=False)))

    assert with_engine(nano[0], scenario) == one_at_a_time(nano[0], prompts[0], parameters(do_sample=False))


def test_the_engine_dies_and_comes_back(nano, prompts):
    def fail(input_ids):
        raise RuntimeError("out of memory, say")

    async def scenario(engine):
        with endless(engine.model, 0.01):
            generations = [engine.generate(prompt, parameters(**LONG)) for prompt in prompts]
            readers = [asyncio.create_task(read(generation)) for generation in generations]
            await wait_for(lambda: generations[0].token_ids)
            with before_forward(engine.model, fail):
                outcomes = await asyncio.wait_for(asyncio.gather(*readers, return_exceptions=True), timeout=10)
        assert [type(outcome) for outcome in outcomes] == [EngineError] * len(prompts)
        assert "out of memory" not in str(outcomes[0])  # what goes wrong inside is for the log
        await wait_for(lambda: not engine.alive, seconds=10)
        with pytest.raises(EngineError):
            engine.generate(prompts[0], parameters())
        await wait_for(lambda: engine.alive)
        assert engine.restarts == 1
        return await read(engine.generate(prompts[0], parameters(do_sample=False)))

    reply = with_engine(nano[0], scenario, slots=2)
    assert reply == one_at_a_time(nano[0], prompts[0], parameters(do_sample=False))


def test_an_engine_that_cannot_start_says_so(nano):
    async def run():
        engine = Engine(nano[0], cache_tokens=10**12)  # more bytes than there are addresses
        with pytest.raises((RuntimeError, MemoryError)):
            await engine.start()
        await engine.close()

    asyncio.run(run())


def test_closing_ends_replies_with_an_error(nano, prompts):
    async def run():
        engine = Engine(nano[0])
        await engine.start()
        with endless(engine.model, 0.01):
            reader = asyncio.create_task(read(engine.generate(prompts[0], parameters(**LONG))))
            await asyncio.sleep(0.05)
            await engine.close()
            with pytest.raises(EngineError):
                await asyncio.wait_for(reader, timeout=10)
        assert not engine.alive

    asyncio.run(run())


def test_the_turns_of_a_chat_share_the_beginning_of_their_prompt(nano):
    card = helpers.get_character("苏梦远")
    history = [["你好呀", "你好。"], ["今天过得怎么样", "还不错，你呢？"]]
    turns = [encode_prompt(nano[1], card, "再见", history[:n]) for n in range(3)]
    computed = []

    async def scenario(engine):
        replies = []
        for prompt in turns:
            computed.append(0)
            with before_forward(engine.model, lambda ids: computed.__setitem__(-1, computed[-1] + ids.shape[1])):
                replies.append(await read(engine.generate(prompt, parameters(do_sample=False))))
        return replies

    replies = with_engine(nano[0], scenario)
    assert replies == [one_at_a_time(nano[0], prompt, parameters(do_sample=False)) for prompt in turns]
    for position in (1, 2):
        shared = next(i for i, (a, b) in enumerate(zip(turns[position - 1], turns[position])) if a != b)
        assert shared > 2 * PAGE_TOKENS
        new = len(turns[position]) + len(replies[position]) - 1 - shared // PAGE_TOKENS * PAGE_TOKENS
        assert computed[position] == new


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter that changes what the model says: both of its matrices are random."""
    directory = tmp_path_factory.mktemp("adapter")
    model, _ = helpers.load("nano", dtype="float32", device_map="cpu")
    targets = ["q_proj", "v_proj", "o_proj", "gate_up_proj"]
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=32, target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(directory)
    return directory


def test_adapters_beside_the_base_model(nano, prompts, adapter):
    model, tokenizer = nano
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with_adapter = PeftModel.from_pretrained(helpers.load("nano", dtype="float32", device_map="cpu")[0], adapter).eval()
    expected = [one_at_a_time(with_adapter, prompt, parameters(do_sample=False)) for prompt in prompts]
    base_expected = [one_at_a_time(model, prompt, parameters(do_sample=False)) for prompt in prompts]
    assert all(a != b for a, b in zip(expected, base_expected))

    async def run():
        service = Service((model, tokenizer), {"lora": adapter})
        await service.load()
        base, lora = service.engines[service.name], service.engines["lora"]
        addresses = {tensor.data_ptr() for tensor in model.parameters()}
        extra = [name for name, tensor in lora.model.named_parameters() if tensor.data_ptr() not in addresses]
        assert extra and all("lora_" in name for name in extra)
        requests = [(prompt, parameters(do_sample=False)) for prompt in prompts]
        try:
            return await asyncio.gather(write_all(base, requests), write_all(lora, requests))
        finally:
            await service.close()

    assert asyncio.run(run()) == [base_expected, expected]
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_many_requests_leave_nothing_in_memory(nano, prompts):
    async def scenario(engine):
        for _ in range(4):
            generations = [engine.generate(prompt, parameters(max_new_tokens=2)) for prompt in prompts]
            generations[0].cancel()
            await asyncio.gather(*[read(generation) for generation in generations[1:]])

    with_engine(nano[0], scenario)
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) in (Generation, RequestState)]


def test_an_adapter_speaks_as_the_persona_beside_it(nano, adapter, tmp_path):
    persona = {"bot_name": "阿青", "bot_info": "剑客，话很少", "user_name": "旅人", "user_info": ""}
    directory = shutil.copytree(adapter, tmp_path / "adapter")
    (directory / ADAPTER_CARD).write_text(json.dumps(persona), encoding="utf-8")
    with nano_server(nano, adapters={"剑客": directory}, cache_tokens=1024) as server:
        completion = openai_client(server).chat.completions.create(model="剑客", **ask("你好"))
    tuned, tokenizer = helpers.load("nano", dtype="float32", device_map="cpu", adapter=directory)
    expected, _ = helpers.chat(tuned, tokenizer, persona, "你好", do_sample=False, max_new_tokens=8)
    assert completion.choices[0].message.content == expected
