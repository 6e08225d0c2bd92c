"""What is wrong with which row of a data file."""

from collections import Counter
from dataclasses import dataclass, field

from ..errors import DataError

CAUSES = {
    "invalid json": "不是有效的 JSON",
    "broken encoding": "编码损坏",
    "unknown format": "不认识的格式",
    "missing field": "缺少字段",
    "wrong type": "类型或取值不对",
    "empty": "内容为空",
    "no persona": "没有人设",
    "duplicate": "重复",
    "too long": "太长",
}


class BadRow(Exception):
    """One row cannot be used: a key of `CAUSES`, and the detail."""


@dataclass
class DataReport:
    """How many rows a file has, and what is wrong with which. `print` it, or show it in a notebook."""

    file: str
    rows: int = 0
    problems: list[tuple[int, str, str]] = field(default_factory=list)  # (line, cause, detail)
    notes: list[str] = field(default_factory=list)
    unused: Counter = field(default_factory=Counter)  # in how many rows a field was left aside

    def add(self, line: int, bad: BadRow) -> None:
        self.problems.append((line, *bad.args))

    def count_by_cause(self) -> Counter:
        return Counter(cause for _, cause, _ in self.problems)

    def check(self, on_bad_row: str, kept: list) -> None:
        """Raise `DataError` if nothing is left, or if there are bad rows and `on_bad_row` is "raise"."""
        if not kept:
            raise DataError(f"没有一行可用的数据 [no usable rows]：{self}")
        if self.problems and on_bad_row == "raise":
            raise DataError(f"数据里有不合格的行 [bad rows]：{self}")

    def __str__(self) -> str:
        lines = [f"{self.file}：{self.rows} 行，可用 {self.rows - len(self.problems)} 行"]
        for cause, count in self.count_by_cause().most_common():
            examples = [(line, detail) for line, other, detail in self.problems if other == cause]
            where = "、".join(str(line) for line, _ in examples[:5]) + (" 等" if count > 5 else "")
            lines.append(f"  {CAUSES[cause]} [{cause}] {count} 行：第 {where} 行。例如 {examples[0][1]:.200}")
        lines += [f"  {note}" for note in self.notes]
        if self.unused:
            names = "、".join(f"{name}（{count} 行）" for name, count in self.unused.most_common())
            lines.append(f"  没有用到的字段 [unused fields]：{names}")
        return "\n".join(lines)

    __repr__ = __str__
