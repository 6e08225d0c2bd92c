"""Runs the cases through one Python client: python python_clients.py NAME URL CASES.json. The last line is the answers."""

import importlib.metadata
import json
import sys
from pathlib import Path

NAME, URL, CASES = sys.argv[1:]
EXTRA = ("chat_template_kwargs",)


def split(case: dict) -> tuple[dict, dict]:
    """What OpenAI's API knows, and what it does not."""
    known = {name: value for name, value in case["body"].items() if name not in EXTRA}
    return known, {name: value for name, value in case["body"].items() if name in EXTRA}


def whole(answer) -> dict:
    choices = answer.choices
    tokens = [answer.usage.prompt_tokens, answer.usage.completion_tokens]
    finish = [choice.finish_reason for choice in choices]
    return {"texts": [choice.message.content for choice in choices], "finish": finish, "tokens": tokens}


def streamed(chunks) -> dict:
    text, finish, tokens = "", None, None
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
        if usage := getattr(chunk, "usage", None):
            tokens = [usage.prompt_tokens, usage.completion_tokens]
    return {"texts": [text], "finish": [finish], "tokens": tokens}


def openai_python(case: dict) -> dict:
    import openai

    client = openai.OpenAI(base_url=URL, api_key=case["key"], max_retries=0)
    known, extra = split(case)
    answer = client.chat.completions.create(**known, extra_body=extra)
    return streamed(answer) if case["body"].get("stream") else whole(answer)


def litellm(case: dict) -> dict:
    import litellm

    known, extra = split(case)
    known["model"] = f"openai/{known['model']}"
    answer = litellm.completion(**known, api_base=URL, api_key=case["key"], max_retries=0, extra_body=extra)
    return streamed(answer) if case["body"].get("stream") else whole(answer)


def langchain_openai(case: dict) -> dict:
    from langchain_core.messages import convert_to_messages
    from langchain_openai import ChatOpenAI

    known, extra = split(case)
    messages, is_stream = convert_to_messages(known.pop("messages")), known.pop("stream", False)
    chat = ChatOpenAI(**known, base_url=URL, api_key=case["key"], max_retries=0, extra_body=extra or None)
    if is_stream:
        pieces = list(chat.stream(messages))
        finish = [f for piece in pieces if (f := piece.response_metadata.get("finish_reason"))]
        return {"texts": ["".join(piece.content for piece in pieces)], "finish": finish}
    result = chat.generate([messages])
    usage = result.llm_output["token_usage"]
    return {
        "texts": [generation.text for generation in result.generations[0]],
        "finish": [generation.generation_info["finish_reason"] for generation in result.generations[0]],
        "tokens": [usage["prompt_tokens"], usage["completion_tokens"]],
    }


def answer(case: dict) -> dict:
    try:
        return globals()[NAME.replace("-", "_")](case)
    except Exception as error:  # what a user of the client sees
        return {"status": getattr(error, "status_code", None), "error": f"{type(error).__name__}: {error}"}


cases = json.loads(Path(CASES).read_text(encoding="utf-8"))
answers = {case["name"]: answer(case) for case in cases}
print(json.dumps([importlib.metadata.version(NAME.removesuffix("-python")), answers]))
