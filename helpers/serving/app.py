"""The HTTP API as an ASGI application: keys, origins, errors and the life of the model around the routes."""

import asyncio
import hmac
import re
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline

from ..errors import HelpersError
from ..network import BehindProxy, check_proxy
from .errors import HANDLED, answer_error
from .metrics import Metrics
from .routes import router
from .service import Service

OPEN = {("GET", "/"), ("HEAD", "/health"), ("GET", "/health")}  # these say nothing that needs a key


def create_app(
    model="auto",
    *,
    adapters: dict | None = None,
    api_key: str | None = None,
    cors_origins: tuple[str, ...] = (),
    proxy: str | None = None,
    log_text: bool = False,
    on_failure: Callable[[], None] = lambda: None,
    **engine_options,
) -> FastAPI:
    """The API as an ASGI application; it loads the model in the background once it has started.

    Args:
        model: "auto", "nano", "6b" or a directory; or a pair (model, tokenizer) that is loaded already.
        adapters: name to directory of LoRA adapters.
        api_key: if given, the API asks for it as a bearer token; `/health` and the documentation stay open.
        cors_origins: web pages of these origins may use the API; none by default.
        proxy: the address at which browsers reach it behind a proxy, see `BehindProxy`.
        log_text: whether the log also holds what was said.
        on_failure: called if the model cannot be loaded.
        engine_options: slots, queue_size, context, cache_tokens, see `Engine`; served_model_name, see `Service`.

    Raises:
        HelpersError: an origin that no browser would send; or there is no such model. Whether its files are good shows when they are loaded.
    """
    check_origins(cors_origins)
    app = FastAPIOffline(title="CharacterGLM", version="1", lifespan=lifespan, redoc_url=None)
    app.state.service, app.state.log_text = Service(model, adapters, **engine_options), log_text
    app.state.metrics, app.state.on_failure = Metrics(app.state.service), on_failure
    app.include_router(router, dependencies=[Depends(key_check(api_key))])
    if cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=cors_origins, allow_methods=["*"], allow_headers=["*"])
    if proxy:
        app.add_middleware(BehindProxy, url=check_proxy(proxy))
    for kind in HANDLED:
        app.add_exception_handler(kind, answer_error)
    return app


def check_origins(origins: tuple[str, ...]) -> None:
    """Refuse what can never be the `Origin` of a web page: browsers send https://my.page, or with :PORT, and no more."""
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#]+", origin):
            raise HelpersError(
                f"网页来源 {origin!r} 不会匹配任何网页 [invalid origin]：写成 https://my.page 或 http://127.0.0.1:8000，末尾没有 /"
            )


@asynccontextmanager
async def lifespan(app: FastAPI):
    """The model is loaded while the server answers already, and stopped with it."""
    loading = asyncio.create_task(app.state.service.load(app.state.on_failure))
    try:
        yield
    finally:  # also after a second Ctrl-C: the engine's thread would keep the process alive
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        await app.state.service.close()


def key_check(api_key: str | None):
    """A dependency that lets in only who has the key; everybody, if there is none."""
    bearer = HTTPBearer(auto_error=False, description="The key the server was started with, if it was.")

    async def check(request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        if api_key is None or (request.method, request["route"].path) in OPEN:
            return
        # In constant time: how long it takes says nothing about how much of the key was right.
        if given is None or not hmac.compare_digest(given.credentials.encode(), api_key.encode()):
            raise HTTPException(401, "缺少或错误的 API key [invalid api key]", {"WWW-Authenticate": "Bearer"})

    return check
