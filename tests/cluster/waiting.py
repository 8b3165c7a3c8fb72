"""Waiting for what a cluster does: a condition is polled until a deadline."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
POLL_SECONDS = 2.0  # a kubectl costs half a second of a core, which the jobs under test need


def wait_for(probe: Callable[[], T | None], seconds: float, what: Callable[[], Any] | str) -> T:
    """The first truthy answer of `probe`, or a failure that says what was waited for."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := probe():
            return found
        time.sleep(POLL_SECONDS)
    pytest.fail(f"not within {seconds:.0f} s: {what if isinstance(what, str) else what()}", pytrace=True)
