"""Two ledgers of checksums against each other. Pure, and free of torch: the driver compares."""

import hashlib
from collections.abc import Mapping

EMPTY = hashlib.sha256(b"").hexdigest()  # of a parameter that vLLM packed away (linear layers on CPU)


def differences(trainer: Mapping[str, str], engine: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """(names whose digests differ, names without proof) of one engine rank. Unproven: packed away, or not derivable by the trainer."""
    unproven = [name for name, value in engine.items() if value == EMPTY or name not in trainer]
    return [name for name, value in engine.items() if name not in unproven and trainer[name] != value], unproven
