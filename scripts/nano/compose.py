"""Training rows without end: a persona, and exchanges of every kind until the row is full."""

import random
from collections.abc import Iterator

import torch

from helpers.characters.dialogues import Dialogue
from helpers.characters.personas import SessionMeta, load_characters

from .everyday import EVERYDAY, Deck, Everyday, Slots, read_rows
from .memory import Memory
from .personas import Personas
from .rows import Row, to_batch
from .tokenizer import LineEncoder

TOKENS_PER_BATCH = 6144
LENGTHS = {256: 0.74, 512: 0.24, 1024: 0.02}  # of the rows of a batch, with the share of the batches
BROAD = {"character": 0.54, "persona": 0.4, "duet": 0.06}  # the kinds of rows; personas teach to read and copy
FOCUS = {"character": 0.79, "persona": 0.19, "duet": 0.02}
MANNERS = {
    "warm": "说话温柔。",
    "lively": "说话活泼。",
    "plain": "说话朴实简短。",
    "bold": "说话豪爽。",
    "scholar": "说话文雅。",
    "folk": "说话像乡里人。",
}


class Composer:
    """Draws rows; everything it knows comes from data/everyday and the dialogues."""

    def __init__(self, encoder: LineEncoder, dialogues: list[Dialogue], rng: random.Random):
        self.encoder, self.rng = encoder, rng
        self.slots = Slots()
        self.cards = load_characters()
        self.everyday = Everyday(rng, self.slots)
        self.memory = Memory(rng, self.everyday)
        self.personas = Personas(rng, self.slots, {v: m for v, m in MANNERS.items() if v in self.everyday.decks})
        self.dialogues = {name: Deck([d for d in dialogues if d.card.bot_name == name], rng) for name in self.cards}
        self.duets = Deck(read_rows(EVERYDAY / "duets.jsonl"), rng)
        self.dialogue_share = 0.1  # of the exchanges with the usual partner: a whole dialogue instead
        self.names = Deck(list(self.cards), rng)
        recalled = [f"recall {kind}" for kind in self.memory.kinds]
        known = [*self.everyday.lines, *self.personas.parts["questions"], *recalled]
        self.meanings = {meaning: number for number, meaning in enumerate(known)}  # of what users say
        self.kinds, self.question_share = BROAD, 0.7

    def batches(self, broad_tokens: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Batches of `TOKENS_PER_BATCH` tokens, rows of one length each.

        Until `broad_tokens` all of a row is learnt, persona and user lines too, as language to know; after that, in
        half batches, only what the character says.
        """
        makers = {"character": self.character_row, "persona": self.persona_row, "duet": self.duet_row}
        size, read = TOKENS_PER_BATCH, 0
        while True:
            if read >= broad_tokens and size == TOKENS_PER_BATCH:
                self.focus()
                size //= 2
            (length,) = self.rng.choices(list(LENGTHS), list(LENGTHS.values()))
            kinds = self.rng.choices(list(self.kinds), list(self.kinds.values()), k=size // length)
            rows = [makers[kind](length) for kind in kinds]
            if size == TOKENS_PER_BATCH:
                for row in rows:
                    row.learnt = range(len(row.ids) - 1)
            yield to_batch(rows, length, self.meanings)
            read += size

    def focus(self) -> None:
        """From now on one reply for each line, no dialogues: what is to be known by heart must be met often.

        A dialogue is met too rarely to be known, and while it is not, each of its lines teaches as loudly as ten others.
        """
        self.everyday.keep_first_replies()
        self.dialogue_share = 0.0
        self.kinds, self.question_share, self.slots.invented_share = FOCUS, 0.6, 0.25

    def character_row(self, length: int) -> Row:
        """A shipped character with its usual partner or somebody else."""
        rng, card = self.rng, self.cards[self.names.draw()]
        session = SessionMeta(bot_name=card.bot_name, bot_info=shorten(card.bot_info, rng), user_name=card.user_name)
        usual = rng.random() < 0.6
        if usual:
            session.user_name, session.user_info = card.user_name, card.user_info if rng.random() < 0.4 else ""
        elif rng.random() < 0.4:
            other = self.cards[rng.choice([name for name in self.cards if name != card.bot_name])]
            session.user_name, session.user_info = other.bot_name, other.bot_info if rng.random() < 0.3 else ""
        else:
            session.user_name = self.slots.name(rng)
        row = Row.begin(self.encoder, session)
        if usual and rng.random() < 0.5:
            row.add(self.encoder, session, length, "", card.greeting)
        talk = self._talk(session, card.bot_name, card.user_name, self._words(session))
        for exchange in talk:
            if usual and rng.random() < self.dialogue_share and not self._dialogue(row, session, card.bot_name, length):
                break
            if not row.add(self.encoder, session, length, *exchange):
                break
        return row

    def _dialogue(self, row: Row, session: SessionMeta, name: str, length: int) -> bool:
        """Append a dialogue of data/dialogues as far as it fits; its greeting only where nothing was said before."""
        for query, reply in self.dialogues[name].draw().history:
            if (query or not row.exchanges) and not row.add(self.encoder, session, length, query, reply):
                return False
        return True

    def persona_row(self, length: int) -> Row:
        """A generated persona: questions about its text, everyday talk, things to remember."""
        persona = self.personas.draw()
        session, facts = persona.session, persona.facts
        row = Row.begin(self.encoder, session)
        words = self._words(session) | {"self": facts["self"], "place_bot": facts["place"]}
        words |= {slot: facts[slot] for slot in ("habit", "trait")}
        talk = self._talk(session, persona.voice, None, words, {"job": facts["job"], "like": facts["like"]})
        while True:
            ask = self.rng.random() < self.question_share or not persona.voice
            exchange = self.personas.question(persona) if ask else next(talk)
            if not row.add(self.encoder, session, length, *exchange):
                return row

    def duet_row(self, length: int) -> Row:
        """Two shipped characters, either of them as the bot."""
        rng = self.rng
        duet = self.duets.draw()
        names = [duet["a"], duet["b"]]
        bot = rng.randrange(2)
        bot_card, user_card = self.cards[names[bot]], self.cards[names[1 - bot]]
        session = SessionMeta(
            bot_name=names[bot],
            bot_info=shorten(bot_card.bot_info, rng),
            user_name=names[1 - bot],
            user_info=user_card.bot_info if rng.random() < 0.5 else "",
        )
        row = Row.begin(self.encoder, session)
        lines = duet["lines"] if bot == 1 else ["", *duet["lines"]]  # the first line is a's
        for query, reply in zip(lines[::2], lines[1::2]):
            if not row.add(self.encoder, session, length, query, reply):
                return row
        for exchange in self._talk(session, names[bot], bot_card.user_name, self._words(session)):
            if not row.add(self.encoder, session, length, *exchange):
                return row
        return row

    def _words(self, session: SessionMeta) -> dict[str, str]:
        return {"bot": session.bot_name, "user": session.user_name, "self": "我"}

    def _talk(
        self, session, speaker: str, partner: str | None, words: dict, facts: dict | None = None
    ) -> Iterator[list[str]]:
        """Everyday exchanges; now and then the user says something and asks for it one to four turns later."""
        rng, known, due = self.rng, {}, {}
        everything = (facts or {}) | words
        for turn in range(200):
            for kind in [kind for kind, at in due.items() if at <= turn]:
                del due[kind]
                yield self.memory.question(speaker, kind, known[kind], everything)
            draw = rng.random()
            kind = rng.choice(list(self.memory.kinds))
            if draw < 0.055:
                exchange, known[kind] = self.memory.statement(speaker, kind, everything)
                due[kind] = turn + rng.randint(1, 4)
                yield exchange
            elif draw < 0.07 and kind not in known and kind != "name":
                yield self.memory.question(speaker, kind, "", everything)
            else:
                yield self.everyday.exchange(speaker, session, partner, words, facts or {})


def shorten(info: str, rng: random.Random) -> str:
    """Leave parts of a persona out at random, so that the model does not depend on its exact wording."""
    draw = rng.random()
    if draw < 0.35:
        return info
    if draw < 0.8:
        return ""
    return "".join(f"{sentence}。" for sentence in info.split("。") if sentence and rng.random() < 0.6)
