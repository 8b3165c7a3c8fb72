"""Quantities as Kubernetes writes them, and what is none."""

from decimal import Decimal

import pytest

from rlhf_api.quantity import parse, whole


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", "2"), (3, "3"), ("500m", "0.5"), ("2k", "2000"), ("1e3", "1000"), ("1E3", "1000"), ("1E", "1e18"),
        ("1e-3", "0.001"), ("+1.5Gi", "1610612736"),
        ("-1", "-1"), ("1.", "1"), (".5", "0.5"), ("128M", "128e6"), ("1Ki", "1024"), ("7Ei", str(7 << 60)),
        ("5n", "5e-9"), ("5u", "5e-6"), (0.5, "0.5"),
    ],
)  # fmt: skip
def test_what_a_quantity_means(text: str | float, value: str) -> None:
    assert parse(text) == Decimal(value)


@pytest.mark.parametrize(
    "text",
    [
        "", "four", "1 Gi", " 1", "1Gi\n", "1gi", "1K", "1Mb", "1e", "e3", ".", "--1", "1e9999", "9Ei", "1e19", "١",
        "1" * 65, True, "0x10", "nan", "inf"
    ]
)
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ValueError, match="quantity"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "value"), [("500m", 1), ("1500m", 2), ("2", 2), ("1Gi", 1 << 30), (3, 3), ("128M", 128_000_000)],
)
def test_whole_ones_are_rounded_up(text: str | int, value: int) -> None:
    assert whole(text) == value
