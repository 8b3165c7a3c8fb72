"""`kubectl rlhf compare`: two runs side by side, from their files, or from what a cluster tells of them."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_cli.exits import NoFiles
from rlhf_cli.fetch import run_directory
from rlhf_cli.options import Output, Target
from rlhf_cli.run_files import opened, scalars
from rlhf_cli.text import sparkline, table

FIRST = ("reward/mean", "rollout/tokens_per_second", "seconds/step", "rollout/length", "train/kl")
CURVE = 24


@dataclass(frozen=True, slots=True)
class Side:
    """One run. `spec` is there for a job alone."""

    name: str
    series: Mapping[str, Mapping[int, float]]
    spec: Mapping[str, Any] | None

    def last(self, metric: str) -> float | None:
        values = list(self.series.get(metric, {}).values())
        return values[-1] if values else None

    def curve(self, metric: str) -> str:
        return sparkline(list(self.series.get(metric, {}).values()), CURVE)


def compare(target: Target, left: str, right: str, output: Output, width: int) -> None:
    """Raises NoFiles, ClientError."""
    sides = _side(target, left), _side(target, right)
    if output is Output.JSON:
        print(json.dumps(facts(*sides), indent=2))
        return
    for line in told(*sides, width):
        print(line)


def _side(target: Target, where: str) -> Side:
    with run_directory(target, where, ("tensorboard",)) as (folder, job):
        found = scalars(opened(folder))
    if not found:
        raise NoFiles(f"{where}: no metrics: telemetry.tensorboard is false, or no step is finished")
    return Side(where, found, job.spec if job else None)


def metrics(a: Side, b: Side) -> list[str]:
    """Of both, those that people look at first before the others."""
    both = {*a.series, *b.series}
    return [name for name in FIRST if name in both] + sorted(both - set(FIRST))


def facts(a: Side, b: Side) -> dict[str, Any]:
    return {
        "runs": [a.name, b.name],
        "steps": [max(max(one) for one in side.series.values()) for side in (a, b)],
        "metrics": {name: [_finite(a.last(name)), _finite(b.last(name))] for name in metrics(a, b)},
        "spec": spec_differences(a.spec, b.spec) if a.spec and b.spec else None,
    }


def told(a: Side, b: Side, width: int) -> Iterator[str]:
    found = facts(a, b)
    rows = [("steps", *map(str, found["steps"]), "", "", "")]
    for name, (left, right) in found["metrics"].items():
        change = f"{right - left:+.4g}" if left is not None and right is not None else ""
        rows.append((name, _number(left), _number(right), change, a.curve(name), b.curve(name)))
    same = a.name[-CURVE:] == b.name[-CURVE:]  # columns go by their names
    names = (a.name[-CURVE:], b.name[-CURVE:] + (" (2)" if same else ""))
    columns = ("METRIC", *names, "CHANGE", "FIRST", "SECOND")
    yield from table(columns, rows, width, columns[:3])
    if found["spec"]:
        yield ""
        yield from table(("SPEC", "FIRST", "SECOND"), found["spec"], width, ("SPEC", "FIRST", "SECOND"))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def spec_differences(a: Any, b: Any, path: str = "spec") -> list[tuple[str, str, str]]:
    """Path, and the value on each side; `–` where there is none."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        names = [*a, *(name for name in b if name not in a)]
        return [one for name in names for one in spec_differences(a.get(name), b.get(name), f"{path}.{name}")]
    if a == b:
        return []
    left, right = ("–" if one is None else json.dumps(one, ensure_ascii=False)[:60] for one in (a, b))
    return [(path, left, right)]
