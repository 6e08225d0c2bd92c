"""From conversations to rows of tokens of one length, and batches of them."""

from dataclasses import dataclass, field

import torch

from helpers.characters.personas import SessionMeta
from helpers.model.tokenization import NEWLINE_ID

from .tokenizer import LineEncoder


@dataclass
class Row:
    """Token ids of one prompt as it grows, and the positions whose next token is what the character says."""

    ids: list[int]
    learnt: list[int] = field(default_factory=list)
    meanings: dict[int, str] = field(default_factory=dict)  # where a reply begins: what the line before it means
    exchanges: int = 0

    @classmethod
    def begin(cls, encoder: LineEncoder, session: SessionMeta) -> "Row":
        """The persona lines, as the chat template writes them."""
        bot, user = session.bot_name, session.user_name
        row = cls([*encoder.first(f"以下是一段{bot}和{user}之间的对话。"), NEWLINE_ID])
        for name, info in ((bot, session.bot_info), (user, session.user_info)):
            if info:
                row.ids += [*encoder.encode(f"关于{name}的信息：{info}"), NEWLINE_ID]
        return row

    def add(self, encoder, session: SessionMeta, limit: int, query: str, reply: str, meaning: str = "") -> bool:
        """Append an exchange if it fits; an empty query lets the character begin."""
        asked = [*encoder.encode(f"[{session.user_name}]"), *encoder.encode(query), NEWLINE_ID] if query else []
        name = encoder.encode(f"[{session.bot_name}]")
        answer = [*encoder.encode(reply), NEWLINE_ID]
        start = len(self.ids) + len(asked) + len(name)
        if start + len(answer) > limit:
            return False
        self.ids += asked + name + answer
        if query:  # a greeting answers nothing: learnt, it becomes the answer to "你好"
            self.learnt += range(start - len(name), start + len(answer) - 1)  # the name too: it can only be copied
        if meaning:
            self.meanings[start - 1] = meaning
        self.exchanges += 1
        return True


def to_batch(rows: list[Row], length: int, numbers: dict[str, int]) -> tuple[torch.Tensor, ...]:
    """(ids, positions to learn, positions where a reply begins, what it answers); positions are of the flattened batch.

    Rows are filled up with 0 on the right; `numbers` gives each meaning its number.
    """
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions, begins, meanings = [], [], []
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        positions += [number * length + position for position in row.learnt]
        begins += [number * length + position for position in row.meanings]
        meanings += [numbers[meaning] for meaning in row.meanings.values()]
    return ids, torch.tensor(positions), torch.tensor(begins), torch.tensor(meanings)
