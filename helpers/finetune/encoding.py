"""From conversations to tokens: exactly the prompts that `helpers.chat` builds, each followed by its reply."""

import statistics

import torch
from torch.nn.utils.rnn import pad_sequence

from ..characters.dialogues import Dialogue
from ..chat.fitting import build_turns, fit_turns
from ..errors import DataError
from ..model.kv_cache import common_prefix_length
from .data import BadRow, DataReport

IGNORED = -100  # the label that the loss leaves out, in torch and transformers
MAX_LENGTH = 512
MAX_PACKED_TOKENS = 4096


def encode(tokenizer, dialogue: Dialogue, max_length: int = MAX_LENGTH) -> list[dict]:
    """The token sequences to train on: `[{"input_ids": [...], "labels": [...]}]`, for most conversations one.

    Every reply is learned once, right after the prompt that inference would build for it (`fit_turns`, the function
    that `chat` uses), token for token. A conversation is one sequence as long as each prompt goes on from the reply
    before. It becomes several where it does not: if the oldest turns must go to keep within `max_length`, or if a reply
    looks different once it is history (one that begins with "(" joins the "]" of the name before it to a single token).

    Labels are -100 for everything but the replies and the newlines that end them. A greeting, which nobody asked for,
    is context.

    Raises:
        BadRow: the persona, one line and its reply alone are longer than `max_length`.
    """
    sequences: list[dict] = []
    ids: list[int] = []
    labels: list[int] = []
    dropped = 0
    for turn, (query, response) in enumerate(dialogue.history):
        if not query.strip():
            continue
        reply = encode_reply(tokenizer, dialogue.card, response)
        room = max_length - len(reply)
        prompt, dropped = fit_turns(
            tokenizer, dialogue.card, build_turns(query, dialogue.history[:turn]), room, dropped
        )
        if len(prompt) > room:
            raise BadRow("too long", f"人设、一句话和回复共 {len(prompt) + len(reply)} 个 token，最多 {max_length}")
        if prompt[: len(ids)] != ids:
            sequences.append({"input_ids": ids, "labels": labels})
            ids, labels = [], []
        labels = labels + [IGNORED] * (len(prompt) - len(ids)) + reply
        ids = prompt + reply
    return [*sequences, {"input_ids": ids, "labels": labels}]


def encode_reply(tokenizer, session_meta, response: str) -> list[int]:
    """The ids of a reply and its newline, as the model would write them after the character's name.

    The reply is encoded as a line of its own: no token reaches across a newline. Encoded together with the name, a
    first "(" or "," could be joined to the name's "]", and the prompt would no longer be the one of inference.
    """

    def render(text: str) -> str:
        message = {"role": "assistant", "content": text}
        return tokenizer.apply_chat_template([message], session_meta=session_meta, tokenize=False)

    line = render(response)[len(render("")) - 1 :]  # what follows the name, the newline included
    (newline,) = tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
    ids = tokenizer(f"\n{line}", add_special_tokens=False)["input_ids"]
    return ids[ids.index(newline) + 1 :]


def encode_samples(
    tokenizer,
    samples: list[Dialogue],
    max_length: int = MAX_LENGTH,
    report: DataReport | None = None,
    on_bad_row: str = "skip",
) -> list[dict]:
    """The sequences of all samples; what is too long is noted in `report` and left out.

    Raises:
        DataError: nothing is left, or something is too long and `on_bad_row` is "raise".
    """
    report = DataReport("数据", rows=len(samples)) if report is None else report
    rows = []
    for sample in samples:
        try:
            rows += encode(tokenizer, sample, max_length)
        except BadRow as bad:
            report.add(getattr(sample, "line", 0), bad)
    report.refuse(on_bad_row, rows)
    return rows


def collate(rows: list[dict]) -> dict:
    """A batch: `share_prefix`, or `pad` where many long rows behind each other would make too large a mask."""
    tokens = sum(len(row["input_ids"]) for row in rows)
    return share_prefix(rows) if tokens <= MAX_PACKED_TOKENS else pad(rows)


def share_prefix(rows: list[dict]) -> dict:
    """All rows of a batch in one sequence: first the tokens that they begin with, once, then the rest of each.

    Rows about one character begin with the same persona, often most of a row. Each token attends to the shared
    beginning and to its own row, at the position it has in its row, so losses and gradients are those of separate rows.
    There is no padding, and logits are computed only for the tokens to learn.

    Returns:
        `input_ids`, `position_ids` (1, T); `attention_mask` (1, 1, T, T), True where a token may look, which needs
        sdpa attention; `logits_to_keep` (K,), the positions before the K learned tokens; `shift_labels` (1, K), those
        tokens, and the same as `labels`, without which transformers computes no loss.
    """
    shared = _shared_length(rows)
    ids, positions = rows[0]["input_ids"][:shared], list(range(shared))
    row_of, targets, predictors = [0] * shared, [], []
    for number, row in enumerate(rows, start=1):
        own = range(shared, len(row["input_ids"]))
        offset = len(ids) - shared  # where a position of this row is in the sequence
        learned = [position for position in own if row["labels"][position] != IGNORED]
        targets += [row["labels"][position] for position in learned]
        predictors += [position - 1 + offset for position in learned]
        ids, positions, row_of = ids + row["input_ids"][shared:], positions + list(own), row_of + [number] * len(own)
    rows_of = torch.tensor(row_of)
    visible = ((rows_of[None] == 0) | (rows_of[None] == rows_of[:, None])).tril()
    labels = torch.tensor([targets], dtype=torch.long)  # by itself, an empty list would become floats
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "attention_mask": visible[None, None],
        "logits_to_keep": torch.tensor(predictors, dtype=torch.long),
        "labels": labels,
        "shift_labels": labels,
    }


def _shared_length(rows: list[dict]) -> int:
    """How many tokens all rows begin with; what predicts a learned token is never shared."""
    first, last = (extreme(row["input_ids"] for row in rows) for extreme in (min, max))  # these two differ first
    own = [next((i for i, label in enumerate(row["labels"]) if label != IGNORED), 1) - 1 for row in rows]
    return min(common_prefix_length(first, last), *own)


def pad(rows: list[dict]) -> dict:
    """A batch, padded on the right to its longest row, for any attention and any loss.

    There is no attention mask: attention is causal, so no real token sees the padding behind it. `logits_to_keep` lets
    the model skip its output layer for the positions that all rows spend on the prompt: with 65,024 pieces, that layer
    is most of the memory of a step.
    """
    ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True, padding_value=0)
    labels = pad_sequence([torch.tensor(row["labels"]) for row in rows], batch_first=True, padding_value=IGNORED)
    learned = (labels != IGNORED).any(dim=0).nonzero()
    first = learned[0].item() if len(learned) else ids.shape[1] - 1
    keep = ids.shape[1] - max(0, first - 1)  # the logits at a position predict the token after it
    return {"input_ids": ids, "labels": labels[:, -keep:], "logits_to_keep": keep}


def describe_lengths(rows: list[dict], padded_to: int = 512) -> dict:
    """Sequences and tokens of a data set: how long, how many are learned, and what padding to one length would cost."""
    if not rows:
        raise DataError("没有数据 [no data]")
    lengths = [len(row["input_ids"]) for row in rows]
    learned = sum(label != IGNORED for row in rows for label in row["labels"])
    return {
        "sequences": len(rows),
        "tokens": sum(lengths),
        "learned_tokens": learned,
        "context_tokens": sum(lengths) - learned,
        "shortest": min(lengths),
        "median": int(statistics.median(lengths)),
        "longest": max(lengths),
        f"padding_if_padded_to_{padded_to}": sum(max(0, padded_to - length) for length in lengths),
    }
