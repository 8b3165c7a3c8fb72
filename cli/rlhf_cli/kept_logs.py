"""x"""
from typing import Any


def show(*a: Any) -> None: ...
