"""Parameters of notebooks: what makes sense passes, what does not is named with its range."""

import pytest

from helpers import check_parameters
from helpers.inspect.parameters import ParameterError


def test_sensible_values_pass() -> None:
    check_parameters(SEED=(0, 0, 9), RATE=(1, 0.0, 1.0), KIND=("a", ["a", "b"]), FLAG=(False, [True, False]))


@pytest.mark.parametrize(
    ("parameter", "range_named"),
    [
        ((10, 0, 9), "0 到 9 的整数"),
        ((True, 0, 9), "0 到 9 的整数"),
        ((1.0, 0, 9), "0 到 9 的整数"),
        (("1", 0, 9), "0 到 9 的整数"),
        ((float("nan"), 0.0, 1.0), "0.0 到 1.0 的数"),
        ((None, 0.0, 1.0), "0.0 到 1.0 的数"),
        (("nf5", ["none", "nf4"]), "'none'、'nf4'。是不是 nf4"),
        ((1, [True, False]), "True、False"),
    ],
)
def test_a_senseless_value_is_refused_with_its_range(parameter: tuple, range_named: str) -> None:
    with pytest.raises(ParameterError, match="invalid parameter") as refused:
        check_parameters(GOOD=(1, 0, 9), X=parameter)
    assert "X = " in str(refused.value) and range_named in str(refused.value)
