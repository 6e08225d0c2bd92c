"""Rows of a data file with their line numbers: JSON, JSONL, CSV, TSV or Parquet, gzipped or not, in any usual encoding."""

import codecs
import csv
import gzip
import io
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import DataError
from .report import BadRow

BETWEEN = re.compile(r"[\s,]*")
WRAPPED = re.compile(r'\s*\{\s*"(?:data|train|rows|instances)"\s*:\s*(?=\[)')  # {"data": [...]}


def read_rows(file: Path, notes: list[str]) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every row; the value is a `BadRow` where it cannot be read.

    What the reader of the report should know about the file is added to `notes`. Raises `DataError` if it is unreadable.
    """
    zipped = file.suffix == ".gz"
    kind = Path(file.stem).suffix if zipped else file.suffix
    try:
        if kind == ".parquet":
            import pyarrow.parquet

            table = enumerate(pyarrow.parquet.read_table(file).to_pylist(), start=1)
        else:
            content = file.read_bytes()
            text = _decode(gzip.decompress(content) if zipped else content, notes)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"读不了数据文件 [cannot read file]：{file}（{error}）") from None
    if kind in (".csv", ".tsv"):
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if kind == ".tsv" else ",")
        table = ((reader.line_num, row) for row in reader)
    elif kind != ".parquet":
        yield from _read_json(text)
        return
    for number, row in table:  # where every row has every column, filled or not
        yield number, {name: value for name, value in row.items() if value not in (None, "")}


def _decode(content: bytes, notes: list[str]) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        notes.append("文件是 UTF-16 编码，已照此读取 [read as UTF-16]")
        return content.decode("utf-16", errors="replace")
    # A byte that is not UTF-8 becomes U+FFFD, by which its row is recognised.
    text = content.decode("utf-8-sig", errors="replace")
    if text.count("\ufffd") > 0.1 * sum(not letter.isascii() for letter in text):  # not a broken byte here and there
        with suppress(UnicodeDecodeError):
            text = content.decode("gb18030")
            notes.append("文件是 GBK 编码，已照此读取 [read as GBK]")
    return text


def _read_json(text: str) -> Iterator[tuple[int, Any]]:
    lines = text.split("\n")  # not splitlines(): U+2028 may stand in a JSON string
    first = next(filter(str.strip, lines), "")
    if WRAPPED.match(text) or not isinstance(_parse(first), dict):
        return _read_values(text)
    return ((number, _parse(line)) for number, line in enumerate(lines, start=1) if line.strip())


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRow("invalid json", str(error))


def _read_values(text: str) -> Iterator[tuple[int, Any]]:
    """The items of arrays and the objects that follow each other in the text, each with the line it begins in."""
    decoder, wrapped = json.JSONDecoder(), WRAPPED.match(text)
    position, in_array, line, counted = (wrapped.end() if wrapped else 0), False, 1, 0
    while (position := BETWEEN.match(text, position).end()) < len(text):
        line, counted = line + text.count("\n", counted, position), position
        if text[position] == ("]" if in_array else "["):
            in_array, position = not in_array, position + 1
            if wrapped and not in_array:
                return
            continue
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            # Go on at the next object, which begins in a line that is indented like the damaged one.
            indent = text[text.rfind("\n", 0, position) + 1 : position]
            position = -1 if indent.strip() else text.find(f"\n{indent}{{", position)
            value = BadRow("invalid json", f"{error}{'；从这里往后都没有读' if position < 0 else ''}")
        yield line, value
        if position < 0:
            return
    if in_array:
        yield line, BadRow("invalid json", "文件结束了，数组还没有：少了 ]")
