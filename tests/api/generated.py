"""Specs made from the CRD's own schema: right, borderline and hostile ones, by a seed. Each must be refused or planned;
none may raise.

`python -m tests.api.generated --count 10000 --seed 0` takes them through the contract and the planner, and prints how
they ended. """

import argparse
import copy
import json
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import yaml

from rlhf_api import kubernetes
from rlhf_api.crd import job_schema
from rlhf_api.parse import parse_lenient
from rlhf_api.run import RunConfig, resolve
from rlhf_operator.decide import Want
from rlhf_operator.observed import read_job
from rlhf_operator.plan import plan
from tests.api.specs import BROKEN, EVALUATION, JUDGE, LIVING, MODEL, Object, a_job

Schema = dict[str, Any]
SPEC: Schema = job_schema()["properties"]["spec"]
PODS = ("head", "trainer", "rollout")
PLANNED = "planned"

TEXTS = (
    "a", "x1", "exact", "some/model", "/data/x", "/checkpoints/run", "file:///c", "s3://bucket/run",
    "http://reward/score", "m:f", "rate {completion}",
    "(a)", "1Gi", "500m", "nvidia.com/gpu", "amd.com/gpu", "q_proj", "API_KEY", "In", "Exists", "RuntimeDefault",
    "NotReady", "10.0.0.0/8", "1.5Gi",
)  # fmt: skip
HOSTILE_TEXTS = (
    "", " ", "a\nb", "a\n", "\x00", "\u202e", "🦄" * 40, "é" * 300, "null", "~", "true", "0x10", "1e999", "-1", "2k",
    "16Gi", "four", "NaN", "../..", "//",
    "/../etc", "a:b", "${HOME}", "$(reboot)", "'; rm -rf /; '", '"', "{}", "*", "&a", "!!python/object:os.system",
    "x" * 5000,
    "cpu", "memory", "kubernetes.io/x", "rlhf-shm", "RAY_ADDRESS", "(a)(b)", "(", "(" * 500 + ")" * 500,
    "(a{99999999999})", "%s", "{completion", "\ufeff", "\u2028",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 0.5, 1.5, 2**31, 2**53, 2**63 - 1, -(2**63), 1e308, 1e-320)
BARE: tuple[Callable[[], Object], ...] = (
    a_job, lambda: a_job(**LIVING), lambda: a_job(placement__mode="Separated", rollout__engines=2),
    lambda: a_job(rewards=[JUDGE, MODEL]),
    lambda: a_job(evaluation=[EVALUATION], trainer__gpus=4, rollout__engines=4),
    lambda: a_job(checkpoint__claim={"size": "1Gi"}),
    lambda: a_job(checkpoint__path="s3://bucket/run", trainer__gpus=16, rollout__engines=16),
)  # fmt: skip


def jobs(seed: int, count: int) -> Iterator[Object]:
    """Reproducible one by one: the n-th of a seed is the same for any count."""
    return (job(Random(f"{seed}:{number}")) for number in range(count))


def job(rng: Random) -> Object:
    """A whole spec from the schema, or one that is right with some of its parts made anew."""
    if rng.random() < 0.1:
        return a_job() | {"spec": value(rng, SPEC)}
    raw = rng.choice(BROKEN)[1] if rng.random() < 0.05 else rng.choice(BARE)()
    raw = copy.deepcopy(raw)
    for _ in range(rng.choice((1, 1, 2, 3, 5, 8))):
        if isinstance(raw["spec"], dict):
            raw["spec"] = changed(rng, SPEC, raw["spec"])
    return raw


def changed(rng: Random, node: Schema, present: Any) -> Any:
    """`present` with one part of it, at any depth, made anew by its schema."""
    properties = node.get("properties")
    if not properties or not isinstance(present, dict) or rng.random() < 0.05:
        return value(rng, node)
    name = rng.choice(list(properties))
    if rng.random() < 0.03:
        return {**present, rng.choice((name.upper(), "fleet", "", "spec", "__class__")): free(rng, 2)}
    if name == "pods" or rng.random() < 0.1:
        name = "pods" if "pods" in properties else name
    part = changed(rng, properties[name], present.get(name, {}))
    return {**present, name: part}


def value(rng: Random, node: Schema) -> Any:
    """Mostly what the schema asks for."""
    if rng.random() < 0.02:
        return hostile(rng)
    if "enum" in node:
        return rng.choice(node["enum"])
    if kubernetes.INT_OR_STRING in node:
        return rng.choice(("1", "500m", "2k", "1.5Gi", "16Gi", "1e3", "four", 1, 0, -1, 4096))
    return MAKERS[node["type"]](rng, node)


def _object(rng: Random, node: Schema) -> Any:
    if "properties" not in node:
        values = node.get("additionalProperties")
        return (
            {rng.choice(TEXTS): value(rng, values) for _ in range(rng.randrange(4))}
            if values
            else free(rng, rng.choice((1, 2, 4, 40)))
        )
    required = node.get("required", ())
    kept = [name for name in node["properties"] if rng.random() < (0.99 if name in required else 0.25)]
    made = {name: value(rng, node["properties"][name]) for name in kept}
    return made | _pod_fields(rng) if "ipcLock" in node["properties"] else made


def _pod_fields(rng: Random) -> Object:
    """Fields that a pod's overrides pass on to the PodSpec."""
    known = kubernetes.POD_SPEC["properties"]
    return {name: value(rng, known[name]) for name in rng.sample(list(known), rng.choice((0, 0, 1, 2)))}


def _array(rng: Random, node: Schema) -> Any:
    most = node.get("maxItems", 256)
    count = rng.choice((most, most + 1)) if rng.random() < 0.02 else rng.choice((node.get("minItems", 0), 1, 1, 2, 3))
    return [value(rng, node["items"])] * count if count > 3 else [value(rng, node["items"]) for _ in range(count)]


def _text(rng: Random, node: Schema) -> str:
    most = node.get("maxLength", 64)
    if rng.random() < 0.03:
        return "x" * int(min(most + rng.choice((-1, 0, 1)), 100_000))
    fitting = [text for text in TEXTS if re.search(node.get("pattern", ""), text)]
    chosen: str = rng.choice(HOSTILE_TEXTS if rng.random() < 0.04 else tuple(fitting) or TEXTS)
    return chosen


def _number(rng: Random, node: Schema) -> Any:
    low, high = node.get("minimum", 0), node.get("maximum", 2**31)
    near = (low, low + 1, low + 2, 2, 4, 8, 64, (low + high) / 2, high, high + 1, low - 1)
    number = rng.choice(NUMBERS) if rng.random() < 0.02 else rng.choice(near if rng.random() < 0.2 else near[:7])
    return int(number) if node["type"] == "integer" and rng.random() < 0.99 else number


MAKERS: dict[str, Callable[[Random, Schema], Any]] = {
    "object": _object, "array": _array, "string": _text, "integer": _number, "number": _number,
    "boolean": lambda rng, _: rng.random() < 0.5,
}  # fmt: skip


def free(rng: Random, depth: int) -> Any:
    """Any JSON; a great depth has no breadth."""
    if depth > 8:
        deep: Any = {}
        for _ in range(rng.choice((20, 31, 40, 200))):
            deep = {"a": deep} if rng.random() < 0.5 else {"a": [deep]}
        return deep
    return {
        rng.choice((*TEXTS, *HOSTILE_TEXTS)): free(rng, depth - 1) if depth > 1 and rng.random() < 0.5 else hostile(rng)
        for _ in range(rng.randrange(4))
    }


def hostile(rng: Random) -> Any:
    return rng.choice(
        (
            None,
            True,
            [],
            {},
            [None],
            {"": None},
            [[]] * 1000,
            {"name": {}},
            rng.choice(NUMBERS),
            rng.choice(HOSTILE_TEXTS),
        )
    )


def outcome(raw: Object) -> str:
    """Where the spec ends. Raises only for a fault of ours."""
    read = parse_lenient(raw)
    if read.job is None:
        return "refused: the schema's"
    if any(not problem for problem in read.problems):
        raise AssertionError("an empty problem")
    if read.problems:
        return (
            "refused: a rule's"
            if any(not one.startswith(("spec.pods", "spec.networkPolicy")) for one in read.problems)
            else "refused: an override's"
        )
    config = resolve(read.job)
    again = RunConfig.model_validate(yaml.safe_load(config.dump()))
    if again.model_copy(update={"stall_timeout_seconds": config.stall_timeout_seconds}) != config:  # of the job alone
        raise AssertionError("the run config is another when it is read")
    json.dumps(planned(raw), allow_nan=False)
    return PLANNED


def planned(raw: Object) -> list[Object]:
    """All that is made for the job's first RayCluster, and that."""
    found = plan(read_job(raw), Want(cluster=1), "rlhf-system")
    return [*found.ensure, *found.create]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    ends: Counter[str] = Counter()
    for number, raw in enumerate(jobs(given.seed, given.count)):
        try:
            ends[outcome(raw)] += 1
        except Exception:  # each is a finding
            ends["RAISED"] += 1
            print(
                f"--- number {number} of seed {given.seed}: {json.dumps(raw)[:2000]}\n{traceback.format_exc()[-1500:]}",
                file=sys.stderr,
            )
    print("\n".join(f"{count:6d}  {end}" for end, count in ends.most_common()))
    return 1 if ends["RAISED"] else 0


if __name__ == "__main__":
    sys.exit(main())
