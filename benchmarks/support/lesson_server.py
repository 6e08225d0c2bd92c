"""The original lesson's server, about as it stands there: one character, one request at a time, on the event loop.

Changed: `model.chat` of the remote code, which no longer runs, is written out with `model.generate`; and what a request does
not say is taken from the model's own settings, as our server does.

    python benchmarks/support/lesson_server.py MODEL_DIR PORT [THREADS]
"""

import datetime
import json
import sys

import torch
import uvicorn
from fastapi import FastAPI, Request

import helpers
from helpers.chat.generation import GenerationParameters, model_defaults

app = FastAPI()


def chat(prompt, history, max_length, top_p, temperature):
    messages = [m for q, a in history for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    messages.append({"role": "user", "content": prompt})
    inputs = tokenizer.apply_chat_template(
        messages, session_meta=session_meta, add_generation_prompt=True, return_tensors="pt"
    )
    options = {"max_length": max_length, "top_p": top_p, "temperature": temperature, "top_k": defaults.top_k}
    options |= {"repetition_penalty": defaults.repetition_penalty, "eos_token_id": [2, 13]}
    outputs = model.generate(**inputs, do_sample=True, **options)
    response = tokenizer.decode(outputs[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return response, [*history, [prompt, response]]


@app.post("/")
async def create_item(request: Request):
    json_post_list = json.loads(json.dumps(await request.json()))
    max_length, top_p, temperature = (json_post_list.get(name) for name in ("max_length", "top_p", "temperature"))
    response, history = chat(
        json_post_list.get("prompt"),
        json_post_list.get("history"),
        max_length=max_length if max_length else 2048,
        top_p=top_p if top_p else 0.7,
        temperature=temperature if temperature else 0.95,
    )
    time = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    return {"response": response, "history": history, "status": 200, "time": time}


@app.get("/health")
async def health():
    return {"status": "ready"}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]) if len(sys.argv) > 3 else torch.get_num_threads())
    model, tokenizer = helpers.load(sys.argv[1])
    defaults = GenerationParameters.check(model_defaults(model))
    session_meta = helpers.get_character("苏梦远")
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", workers=1)
