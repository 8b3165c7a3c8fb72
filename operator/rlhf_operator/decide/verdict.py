"""What one condition says."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["True", "False", "Unknown"]


@dataclass(frozen=True, slots=True)
class Verdict:
    status: Status
    reason: str
    message: str


def yes(reason: str, message: str) -> Verdict:
    return Verdict("True", reason, message)


def no(reason: str, message: str) -> Verdict:
    return Verdict("False", reason, message)


def unknown(reason: str, message: str) -> Verdict:
    return Verdict("Unknown", reason, message)
