"""From token ids as the engine writes them to text as a client reads it: whole characters, cut at stop texts."""

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Literal

from ..chat.generation import STOP_IDS, StreamDecoder


@dataclass(frozen=True)
class Piece:
    """The next part of a reply. `finish_reason` is set on the last one."""

    text: str
    tokens: int  # generated so far
    finish_reason: Literal["stop", "length"] | None = None


async def read_text(tokenizer, generation, stops: Iterable[str] = ()) -> AsyncIterator[Piece]:
    """The reply of an engine's `Generation`, piece by piece, up to the first of `stops`.

    What could be the beginning of a stop text is held back until it is clear.
    """
    growing, sent, stops = StreamDecoder(tokenizer), 0, list(stops)
    held = max((len(stop) for stop in stops), default=1) - 1
    async for token_ids in generation:
        text = growing.add(token_ids)
        cut = min((place for stop in stops if (place := text.find(stop)) >= 0), default=-1)
        if cut >= 0:
            yield Piece(text[sent:cut], len(generation.token_ids), "stop")
            return
        if (safe := len(text) - held) > sent:
            yield Piece(text[sent:safe], len(generation.token_ids))
            sent = safe
    ended_by_itself = generation.token_ids[-1] in STOP_IDS
    yield Piece(growing.text[sent:], len(generation.token_ids), "stop" if ended_by_itself else "length")
