"""Rows of a data file with their line numbers: JSON, JSONL, CSV, TSV or Parquet, gzipped or not, in any usual encoding."""

import codecs
import csv
import gzip
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from .report import BadRow

BETWEEN = re.compile(r"[\s,]*")
WRAPPED = re.compile(r'\s*\{\s*"(?:data|train|rows|instances)"\s*:\s*(?=\[)')  # {"data": [...]}


def read_rows(file: Path, notes: list[str]) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every row; the value is a `BadRow` where it cannot be read.

    Args:
        notes: what the reader of the report should know about the file is added to it.

    Raises:
        DataError: the file cannot be read.
    """
    name = Path(file.stem if file.suffix == ".gz" else file.name)
    try:
        if name.suffix == ".parquet":
            yield from _read_parquet(file)
            return
        content = file.read_bytes()
        text = _decode(gzip.decompress(content) if file.suffix == ".gz" else content, notes)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"读不了数据文件 [cannot read file]：{file}（{error}）") from None
    if name.suffix in (".csv", ".tsv"):
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if name.suffix == ".tsv" else ",")
        yield from ((table.line_num, _without_empty(row)) for row in table)
    else:
        yield from _read_json(text)


def _read_parquet(file: Path) -> Iterator[tuple[int, dict]]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(file).to_pylist()
    return ((number, _without_empty(row)) for number, row in enumerate(table, start=1))


def _without_empty(row: dict) -> dict:
    return {name: value for name, value in row.items() if value not in (None, "")}  # a table has all columns


def _decode(content: bytes, notes: list[str]) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        notes.append("文件是 UTF-16 编码，已照此读取 [read as UTF-16]")
        return content.decode("utf-16", errors="replace")
    # A byte that is not UTF-8 becomes U+FFFD, by which its row is recognised.
    text = content.decode("utf-8-sig", errors="replace")
    not_ascii = len(text) - len(text.encode("ascii", errors="ignore"))
    if text.count("\ufffd") > 0.1 * not_ascii:  # that is not a broken byte here and there
        try:
            text = content.decode("gb18030")
            notes.append("文件是 GBK 编码，已照此读取 [read as GBK]")
        except UnicodeDecodeError:
            pass
    return text


def _read_json(text: str) -> Iterator[tuple[int, Any]]:
    lines = text.split("\n")  # not splitlines(): U+2028 may stand in a JSON string
    first = next((line for line in lines if line.strip()), "")
    if WRAPPED.match(text) or not isinstance(_parse(first), dict):
        yield from _read_values(text)
        return
    yield from ((number, _parse(line)) for number, line in enumerate(lines, start=1) if line.strip())


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
            following = _next_object(text, position)
            lost = "；从这里往后都没有读" if following is None else ""
            yield line, BadRow("invalid json", f"{error}{lost}")
            if following is None:
                return
            position = following
        else:
            yield line, value
    if in_array:
        yield line, BadRow("invalid json", "文件结束了，数组还没有：少了 ]")


def _next_object(text: str, position: int) -> int | None:
    """Where the next object begins after a damaged one: at a line that is indented like it."""
    indent = text[text.rfind("\n", 0, position) + 1 : position]
    found = -1 if indent.strip() else text.find(f"\n{indent}{{", position)
    return None if found < 0 else found
