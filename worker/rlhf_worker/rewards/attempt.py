"""What one try of a reward needs, whatever its type."""

import contextlib
import math
from typing import Any

from rlhf_api.job import RewardSpec
from rlhf_worker.errors import RewardFailed
from rlhf_worker.experience import Sample


class Failure(Exception):
    """One try failed; the message says how. It is tried again, or becomes a RewardFailed."""


def arguments(sample: Sample) -> dict[str, Any]:
    """What a reward gets of a sample: the prompt as the data has it, the completion, and the row's other columns."""
    return {"prompt": sample.prompt.text, **sample.prompt.fields, "completion": sample.text}


def finite(value: Any) -> float:
    """A reward must be a finite number. Raises Failure."""
    with contextlib.suppress(OverflowError):  # an integer beyond the floats
        if isinstance(value, bool | int | float) and math.isfinite(value):
            return float(value)
    raise Failure(f"returned {value!r:.200}, a finite number is needed")


def failed(spec: RewardSpec, sample: Sample, reason: Failure) -> RewardFailed:
    """The error that ends the run once every try has failed."""
    tries = f"{spec.retries + 1} times" if spec.retries else "once (retries is 0)"
    return RewardFailed(f"rewards[{spec.name}] failed {tries} on prompt {sample.prompt.uid}, completion {sample.text!r:.120}: {reason}")
