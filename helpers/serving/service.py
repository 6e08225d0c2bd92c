"""The model behind the API: loading it, choosing an engine and a persona for a request, and starting the reply."""

import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from ..characters.personas import SessionMeta, load_characters
from ..chat.fitting import fit_prompt
from ..chat.generation import GenerationParameters, model_defaults
from ..errors import ChatError, EngineError, HelpersError
from ..model.adapters import adapter_card, add_adapter
from ..model.loading import load, pick_model, resolve_model
from .engine import Engine, Generation, shared_copy

logger = logging.getLogger("helpers.serving")

ANY_MODEL = "characterglm"  # stands for the model, whichever it is


class UnknownModelError(HelpersError, KeyError):
    """A request names a model, adapter or character that is not here."""

    def __str__(self) -> str:
        return self.args[0]


class Service:
    """One model and its adapters, an engine each.

    Args:
        model: "auto", "nano", "6b" or a directory, as for `helpers.load`; or a pair (model, tokenizer) already loaded.
        adapters: name to directory of LoRA adapters; a request chooses one by its name as `model`.
        served_model_name: one more name for the model.
        engine_options: for `Engine`.
    """

    def __init__(
        self,
        model="auto",
        adapters: dict[str, str | Path] | None = None,
        served_model_name: str | None = None,
        **engine_options,
    ):
        self.source, self.adapters, self.engine_options = model, dict(adapters or {}), engine_options
        self.name = ANY_MODEL if isinstance(model, tuple) else resolve_model(pick_model(model)[0]).name
        # An adapter speaks as the persona that is kept beside it.
        own_cards = {name: adapter_card(directory) for name, directory in self.adapters.items()}
        self.characters = load_characters() | {name: card for name, card in own_cards.items() if card}
        # `characterglm` works on every model, so that copied code does, too.
        self.model_names = list(
            dict.fromkeys([self.name, *filter(None, [served_model_name]), ANY_MODEL, *self.adapters, *self.characters])
        )
        self.engines: dict[str, Engine] = {}
        self.tokenizer = None
        self.defaults: dict = {}  # what the model's own files say about generation
        self.failure: Exception | None = None
        self._tokenizer_lock = threading.Lock()  # its settings are not made for several threads

    @property
    def status(self) -> str:
        """ "loading", "ready", or "dead" while an engine is down or if the model could not be loaded."""
        if self.failure is None and not self.engines:
            return "loading"
        return "ready" if self.engines and all(engine.alive for engine in self.engines.values()) else "dead"

    async def load(self, on_failure: Callable[[], None] = lambda: None) -> None:
        """Load the model and start the engines, unless that is done; `failure` also tells if it did not work."""
        if self.status != "loading":
            return
        engines: dict[str, Engine] = {}
        try:
            engines = await asyncio.to_thread(self._make_engines)
            for engine in engines.values():
                await engine.start()
            self.engines = engines
            logger.info("ready", extra={"model": self.name})
        except Exception as error:
            logger.exception("cannot load the model")
            self.failure = error
            for engine in engines.values():
                await engine.close()
            on_failure()
            raise

    async def close(self) -> None:
        """Stop the engines."""
        engines, self.engines = self.engines, {}
        for engine in engines.values():
            await engine.close()

    def _make_engines(self) -> dict[str, Engine]:
        model, self.tokenizer = self.source if isinstance(self.source, tuple) else load(self.source)
        self.defaults = model_defaults(model)
        engines = {self.name: Engine(model, **self.engine_options)}
        for name, directory in self.adapters.items():
            # An engine and a KV cache of its own: switching adapters inside one batch gives wrong tokens.
            adapted = add_adapter(shared_copy(model), directory).get_base_model()
            engines[name] = Engine(adapted, **self.engine_options)
        return engines

    def choose(self, name: str | None) -> tuple[Engine, SessionMeta | None]:
        """The engine and the character that a request's `model` stands for.

        Raises:
            UnknownModelError: nothing has this name; EngineError: the model is still being loaded.
        """
        if name:
            self.check_name(name)
        if not self.engines:
            raise EngineError("模型还在加载 [loading]：请过几秒再试")
        return self.engines.get(name or self.name, self.engines[self.name]), self.characters.get(name or "")

    def check_name(self, name: str) -> None:
        """Raise UnknownModelError if there is neither a model nor an adapter nor a character called `name`."""
        if name not in self.model_names:
            raise UnknownModelError(f"没有叫 {name!r} 的模型 [model not found]，可选：{'、'.join(self.model_names)}")

    async def start(
        self, engine: Engine, persona: SessionMeta, turns: list, chosen: dict, n: int = 1
    ) -> list[Generation]:
        """Begin `n` replies to one prompt, each with a seed of its own if one is given.

        Args:
            turns: lists of chat messages, as for `fit_prompt`; the oldest are left out if they do not fit.
            chosen: generation parameters, over the model's own defaults.

        Raises:
            ChatError: senseless parameters or a prompt that is too long; OverloadError, EngineError: see `Engine`.
        """
        parameters = GenerationParameters.check({**self.defaults, **chosen})
        context = min(parameters.max_length or engine.context, engine.context)
        # Every message is two tokens at least: more turns cannot fit, and rendering them would hold up others.
        turns = turns[-max(1, context // 2) :]
        if n > engine.slots:
            raise ChatError(f"一次最多 {engine.slots} 条回复 [too many replies]：n={n}，请减小 n")
        generations: list[Generation] = []
        try:
            generations += (engine.reserve() for _ in range(n))
            input_ids, _, parameters.max_new_tokens = await asyncio.to_thread(
                self._fit, persona, turns, parameters, context
            )
            for number, generation in enumerate(generations):
                seed = None if parameters.seed is None else (parameters.seed + number) % 2**63
                generation.start(input_ids, parameters.model_copy(update={"seed": seed}))
            return generations
        except BaseException:
            for generation in generations:
                generation.cancel()
            raise

    def _fit(self, *arguments):
        with self._tokenizer_lock:
            return fit_prompt(self.tokenizer, *arguments)
