"""llama.cpp's server in this process: `xllamacpp` is a prebuilt wheel of it (requirements-dev.txt)."""

import math
import subprocess
import time
from pathlib import Path

import httpx

CONTEXT = 2048


class LlamaServer:
    """A GGUF file, ready to answer; `context` tokens are shared out to `parallel` users."""

    def __init__(self, file: Path, context: int = CONTEXT, parallel: int = 1, threads: int = 1):
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel = str(file), context, parallel
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.use_jinja, settings.verbosity = True, 0
        self.server = xllamacpp.Server(settings)
        self.client = httpx.Client(base_url=self.server.listening_address, timeout=600, trust_env=False)

    def complete(self, prompt: list[int], tokens: int, **options) -> dict:
        """Greedy, without a penalty on repetition."""
        body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "repeat_penalty": 1, "return_tokens": True}
        answer = self.client.post("/completion", json=body | options)
        return answer.raise_for_status().json()

    def seconds(self, prompt: list[int], tokens: int) -> float:
        """CPU seconds of one token of exactly so many, with the prompt read before."""
        self.complete(prompt, 1)
        start = time.process_time()
        ids = self.complete(prompt, tokens, ignore_eos=True)["tokens"]
        return (time.process_time() - start) / len(ids)

    def reply(self, prompt: list[int], tokens: int) -> list[int]:
        """A reply of at most so many tokens, which ends where the model ends it."""
        return self.complete(prompt, tokens)["tokens"]

    def perplexity(self, rows: list[dict], vocabulary: int) -> float:
        """As `helpers.finetune.perplexity`: one request a learned token, whose beginning the server has in its cache."""
        losses = []
        for row in rows:
            for place, label in enumerate(row["labels"]):
                if label >= 0:
                    answer = self.complete(row["input_ids"][:place], 1, n_probs=vocabulary)
                    likely = answer["completion_probabilities"][0]["top_logprobs"]
                    losses.append(-next(token["logprob"] for token in likely if token["id"] == label))
        return math.exp(sum(losses) / len(losses))


def to_q4_k_m(source: Path, target: Path) -> Path:
    """Quantise with llama.cpp's `llama-quantize`, which must be on the PATH."""
    subprocess.run(["llama-quantize", source, target, "Q4_K_M"], check=True, capture_output=True)
    return target
