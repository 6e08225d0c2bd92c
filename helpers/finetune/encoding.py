"""From conversations to tokens, exactly the prompts that `helpers.chat` builds; and from rows of tokens to batches.

A row is `{"input_ids": [...], "labels": [...]}`, of equal length; where a label is -100, nothing is learned.
"""

import statistics
import sys
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn.functional import pad as fill
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ..characters.dialogues import Dialogue
from ..chat.fitting import turns_to_drop
from ..errors import DataError
from ..model.kv_cache import common_prefix_length
from ..model.tokenization import NEWLINE_ID
from .data import BadRow, DataReport

IGNORED = -100  # the label that the loss leaves out, in torch and transformers
MAX_LENGTH = 512
MAX_PACKED_TOKENS = 4096  # the mask of a packed batch has the square of that: 16 MiB
EMPTY_ROW = {"input_ids": [0], "labels": [IGNORED]}  # counts for nothing


# --- 1. A conversation as lines of tokens


@dataclass(frozen=True)
class Turn:
    """What is said in one exchange, in tokens."""

    question: list[int]  # "[user]...\n"; empty for a greeting
    reply: list[int]  # "...\n", as the model writes it after "[bot]"
    remembered: list[int]  # "[bot]...\n", as the line is read once it is history


def encode_lines(tokenizer, dialogue: Dialogue) -> tuple[list[int], list[int], list[Turn]]:
    """(header, name, turns): the persona, "[bot]" and all that is said, rendered by the template and encoded by lines.

    The template makes one line of every message, and no token reaches across a line break, so lines may be encoded one
    by one and put together to any prompt. Encoding each prompt as a whole would take time in the square of the turns.
    """
    messages = dialogue.messages
    options = {"session_meta": dialogue.card, "add_generation_prompt": True, "tokenize": False}
    *lines, name = tokenizer.apply_chat_template(messages, **options).split("\n")
    header, said = "\n".join(lines[: -len(messages)]), lines[-len(messages) :]
    replies = [line[len(name) :] for line, message in zip(said, messages) if message["role"] == "assistant"]
    # The tokenizer puts a space before a text: right for the header, for the others a line break comes in between.
    texts = [f"{header}\n", f"\n{name}", *(f"\n{line}\n" for line in [*said, *replies])]
    header_ids, *encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    name_ids, *line_ids = (ids[ids.index(NEWLINE_ID) + 1 :] for ids in encoded)
    said_ids, reply_ids = iter(line_ids[: len(said)]), iter(line_ids[len(said) :])
    turns = [Turn(next(said_ids) if query else [], next(reply_ids), next(said_ids)) for query, _ in dialogue.history]
    return tokenizer.prefix_ids + header_ids, name_ids, turns


# --- 2. Lines of tokens as rows to learn from
#
# Every reply is learned once, and a conversation goes on in the same row as long as each prompt begins with the row so
# far. It needs several rows where that ends: if the oldest turns must go to keep within `max_length`, or if a reply
# looks different once it is history. In the 6B's vocabulary "](" is one token, so "[bot](smiles)" is written as "]" and
# "(", and read as "](".
#
# That is also why labels do not come from the template's generation block (transformers' return_assistant_tokens_mask):
# it encodes the conversation as a whole, with tokens that are partly name, partly reply. Elsewhere both are the same.


def encode(tokenizer, dialogue: Dialogue, max_length: int = MAX_LENGTH) -> list[dict]:
    """The rows to train on, for most conversations one: every reply right after the prompt that inference builds for it.

    Raises `BadRow` if the persona, one line and its reply alone are longer than `max_length`.
    """
    header, name, turns = encode_lines(tokenizer, dialogue)
    said = [0, *accumulate(len(turn.question) + len(turn.remembered) for turn in turns)]  # tokens before each turn
    rows: list[dict] = []
    first, goes_on = 0, False  # the oldest turn in the prompt; does the row so far begin the next prompt?
    for number, turn in enumerate(turns):
        if not turn.question:  # a greeting, which nobody asked for, is context
            continue
        asked = turn.question + name
        whole = len(header) + said[number] + len(asked)
        room = max_length - len(turn.reply)
        before, first = first, turns_to_drop(lambda start: whole - said[start], number + 1, room, first)  # noqa: B023
        if (needed := whole - said[first] + len(turn.reply)) > max_length:
            raise BadRow("too long", f"人设、一句话和回复共 {needed} 个 token，最多 {max_length}")
        if not goes_on or first != before:
            rows.append({"input_ids": [], "labels": []})
            earlier = [ids for past in turns[first:number] for ids in (*past.question, *past.remembered)]
            asked = header + earlier + asked
        rows[-1]["input_ids"] += asked + turn.reply
        rows[-1]["labels"] += [IGNORED] * len(asked) + turn.reply  # with its newline, which ends the reply
        goes_on = turn.remembered == name + turn.reply
    return rows


def encode_samples(tokenizer, samples, max_length=MAX_LENGTH, report=None, on_bad_row="skip") -> list[dict]:
    """The rows of all samples; what is too long is noted in `report` and left out, or, by "raise", a `DataError`."""
    report = DataReport("数据", rows=len(samples)) if report is None else report
    rows = []
    often = 0.1 if sys.stderr.isatty() else 10  # in a log, a line now and then
    for sample in tqdm(samples, "编码 [encoding]", delay=often + 2, mininterval=often):
        try:
            rows += encode(tokenizer, sample, max_length)
        except BadRow as bad:
            report.add(getattr(sample, "line", 0), bad)
    report.check(on_bad_row, rows)
    return rows


def describe_lengths(rows: list[dict], padded_to: int = 512) -> dict:
    """Rows and tokens of a data set: how long, how many are learned, and what padding to one length would cost."""
    if not rows:
        raise DataError("没有数据 [no data]")
    lengths = [len(row["input_ids"]) for row in rows]
    learned = count_learned(rows)
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


def count_learned(rows: list[dict]) -> int:
    return sum(label != IGNORED for row in rows for label in row["labels"])


# --- 3. Rows as a batch: pad, pack, share
#
# Two rows that begin with the same persona P Q and question R; learned are the replies a b and c:
#
#     row 1:  P Q R a b          row 2:  P Q R c
#
# pad:    P Q R a b              2 x 5 tokens; the 0 is computed for nothing
#         P Q R c 0
# pack:   P Q R a b P Q R c      1 x 9 tokens at the positions 0 1 2 3 4 0 1 2 3; each row sees itself only
# share:  P Q R a b R c          1 x 7 tokens at the positions 0 1 2 3 4 2 3; P Q is computed once, for both rows
#
# All three give the same loss and the same gradient.


def collate(rows: list[dict]) -> dict:
    """A batch: `share_prefix`, or `pad` where many long rows behind each other would make too large a mask."""
    tokens = sum(len(row["input_ids"]) for row in rows)
    return share_prefix(rows) if tokens <= MAX_PACKED_TOKENS else pad(rows)


def pad(rows: list[dict]) -> dict:
    """The rows among each other, filled up on the right to the longest; for any kind of attention.

    There is no attention mask: attention is causal, so no real token sees the padding behind it. Logits are computed
    from the first position on that predicts a learned token of any row: with 65,024 pieces, the output layer is most of
    the memory of a step.

    Returns:
        `input_ids` (B, T); `logits_to_keep` (K,), positions; `labels` and `shift_labels` (B, K), the token after each.
    """
    ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True, padding_value=0)
    labels = pad_sequence([torch.tensor(row["labels"]) for row in rows], batch_first=True, padding_value=IGNORED)
    following = fill(labels[:, 1:], (0, 1), value=IGNORED)  # the logits at a position predict the token after it
    learned = (following != IGNORED).any(dim=0).nonzero()
    first = learned[0].item() if len(learned) else ids.shape[1] - 1
    kept = torch.arange(first, ids.shape[1])
    return {"input_ids": ids, "logits_to_keep": kept} | _targets(following[:, first:].contiguous())


def share_prefix(rows: list[dict]) -> dict:
    """`pack`, with the tokens that all rows begin with computed once: rows about one character share the persona."""
    first, last = (extreme(row["input_ids"] for row in rows) for extreme in (min, max))  # these two differ first
    # What predicts the first learned token of a row stays its own.
    own = [next((i for i, label in enumerate(row["labels"]) if label != IGNORED), 1) - 1 for row in rows]
    return pack(rows, min(common_prefix_length(first, last), *own))


def pack(rows: list[dict], shared: int = 0) -> dict:
    """The rows behind each other in one sequence, after the first `shared` tokens, which all have in common.

    Each token attends to the shared beginning and to its own row, at the position it has in its row. There is no
    padding, and logits are computed only for the tokens to learn.

    Returns:
        `input_ids`, `position_ids` (1, T); `attention_mask` (1, 1, T, T), True where a token may look, which needs
        sdpa attention; `logits_to_keep` (K,), the positions before the K learned tokens; `labels` and `shift_labels`
        (1, K), those tokens.
    """
    # The shared beginning counts as row 0. In the example (shared = 2) the loop makes of it
    # ids        P Q | R a b | R c
    # positions  0 1 | 2 3 4 | 2 3
    # row_of     0 0 | 1 1 1 | 2 2
    # predictors         2 3     5    (where R, a and R stand: they predict a, b and c)
    ids, positions, row_of = rows[0]["input_ids"][:shared], list(range(shared)), [0] * shared
    targets, predictors = [], []
    for number, row in enumerate(rows, start=1):
        for position in range(shared, len(row["input_ids"])):
            if row["labels"][position] != IGNORED:
                targets.append(row["labels"][position])
                predictors.append(len(ids) - 1)
            ids.append(row["input_ids"][position])
            positions.append(position)
            row_of.append(number)
    # visible[i, j]: j is of row 0 or of the row of i, and not behind i.
    rows_of = torch.tensor(row_of)
    visible = ((rows_of[None] == 0) | (rows_of[None] == rows_of[:, None])).tril()
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "attention_mask": visible[None, None],
        "logits_to_keep": torch.tensor(predictors, dtype=torch.long),  # by itself, an empty list would become floats
    } | _targets(torch.tensor([targets], dtype=torch.long))


def _targets(following: torch.Tensor) -> dict:
    # `shift_labels` says that logits and labels face each other already; without `labels` there would be no loss.
    return {"labels": following, "shift_labels": following}
