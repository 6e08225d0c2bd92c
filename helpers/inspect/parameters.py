"""Checks the parameters of a notebook, so that a typing error stops its first cell and not the one after the training."""

from typing import Any

from ..errors import HelpersError, did_you_mean


class ParameterError(HelpersError, ValueError):
    """A parameter has a value that makes no sense."""


def check_parameters(**parameters: tuple | list) -> None:
    """Refuse senseless values: `check_parameters(SEED=(SEED, 0, 99), MODE=(MODE, ["a", "b"]))`.

    Args:
        parameters: name to (value, lowest, highest), of the type of `lowest`, or to (value, list of choices).

    Raises:
        ParameterError: the first value outside its range, with the range.
    """
    for name, (value, *allowed) in parameters.items():
        if not _is_allowed(value, *allowed):
            raise ParameterError(f"{name} = {value!r} 没有意义 [invalid parameter]：{_explain(value, *allowed)}")


def _is_allowed(value: Any, low: Any, high: Any = None) -> bool:
    if isinstance(low, list):
        return any(value == choice and type(value) is type(choice) for choice in low)
    # True is an int to Python, and 1 a good float to a reader.
    right_type = type(value) is int or (isinstance(low, float) and type(value) is float)
    return right_type and low <= value <= high


def _explain(value: Any, low: Any, high: Any = None) -> str:
    if isinstance(low, list):
        names = [str(choice) for choice in low]
        return f"可选 {'、'.join(map(repr, low))}。{did_you_mean(str(value), names)}"
    return f"应是 {low} 到 {high} 的{'数' if isinstance(low, float) else '整数'}"
