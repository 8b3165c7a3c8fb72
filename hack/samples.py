"""The samples that run on a CPU, by name: what `make demo JOB=...` and `make try JOB=...` take."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from pathlib import Path

SAMPLES = Path("manifests/samples")
ON_CPU = ("tiny", "smollm2")  # what the names of those begin with
TINY = "models/tiny"


def names() -> list[str]:
    return sorted(path.stem for path in SAMPLES.glob("*.yaml") if path.stem.startswith(ON_CPU))


def found(name: str) -> Path:
    """The manifest of this name. Ends the process, with the nearest name, where there is none."""
    if name in names():
        return SAMPLES / f"{name}.yaml"
    if (SAMPLES / f"{name}.yaml").exists():
        sys.exit(f"JOB={name} needs GPUs: kubectl rlhf run -f {SAMPLES / name}.yaml on a cluster that has them. Those "
            f"for a CPU are {', '.join(names())}")
    near = get_close_matches(name, names(), n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    sys.exit(f"JOB={name}: no such sample{hint}: one of {', '.join(names())}")
