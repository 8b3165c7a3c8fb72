"""`kubectl rlhf init`: a valid manifest from a few answers."""

import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from rlhf_api.job import AlgorithmSpec
from rlhf_api.parse import InvalidJob, parse_job
from rlhf_cli.convert import ordered
from rlhf_cli.convert_rules import IMAGE
from rlhf_cli.exits import Wrong
from rlhf_client.errors import nearest

Raw = dict[str, Any]
GYM = "rlhf_worker.rewards.reasoning_gym:score"
MATH = "rlhf_worker.rewards.math_answers:score"


@dataclass(frozen=True, slots=True)
class Answers:
    """What a user says; None: not yet."""

    name: str | None = None
    model: str | None = None
    data: str | None = None
    reward: str | None = None
    gpus: int | None = None
    steps: int | None = None
    storage: str | None = None
    algorithm: str = "grpo"
    separated: bool = False
    image: str = IMAGE


# Flag, question, and the answer that stands there.
QUESTIONS: dict[str, tuple[str, str]] = {
    "name": ("Name of the job", "first"),
    "model": ("Model: hub id, or a directory inside the pods", "Qwen/Qwen3-0.6B"),
    "data": ("Prompts: .jsonl or .parquet file inside the pods, hub dataset, or gym:<task>", "gym:basic_arithmetic"),
    "reward": ("Reward: module:function, math, or an http(s) URL", ""),
    "gpus": ("GPUs", "1"),
    "steps": ("Training steps", "100"),
    "storage": ("Volume for the checkpoints, such as 100Gi", "100Gi"),
}  # fmt: skip


def asked(given: Answers, ask: Callable[[str, str], str]) -> Answers:
    """With every answer. Raises Wrong for a number that is none."""
    found = asdict(given)
    for field, (question, default) in QUESTIONS.items():
        if found[field] is None and not (field == "reward" and str(found["data"]).startswith("gym:")):
            answer = ask(question, default)
            if field in ("gpus", "steps") and not answer.isdigit():
                raise Wrong(f"{question}: {answer!r} is no number")
            found[field] = int(answer) if field in ("gpus", "steps") else answer
    return Answers(**found)


def unattended(question: str, default: str) -> str:
    """Nobody can be asked: the default, where there is one."""
    if default:
        return default
    flag = next(name for name, (words, _) in QUESTIONS.items() if words == question)
    raise Wrong(f"--{flag} is missing, and nobody can be asked here: {question}")


def manifest(answers: Answers) -> str:
    """YAML of a valid job. Raises Wrong with what is not valid."""
    known = list(AlgorithmSpec.model_fields["name"].annotation.__args__)  # type: ignore[union-attr]
    if answers.algorithm not in known:
        raise Wrong(f"--algorithm {answers.algorithm}{nearest(answers.algorithm, known)}: one of {', '.join(known)}")
    raw = {
        "apiVersion": "rlhf.dev/v1alpha1", "kind": "RLHFJob", "metadata": {"name": answers.name},
        "spec": ordered(spec(answers)),
    }
    try:
        parse_job(raw)
    except InvalidJob as error:
        raise Wrong("\n  ".join(["this makes no valid job:", *error.problems])) from None
    text: str = yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
    return f"# kubectl rlhf explain -f FILE tells what it takes, kubectl rlhf run -f FILE runs it.\n{text}"


def spec(answers: Answers) -> Raw:
    """Half of the GPUs are the engines' where they have their own."""
    gpus = answers.gpus or 1
    engines = max(1, gpus // 2) if answers.separated else gpus
    return {
        "image": answers.image, "model": {"path": answers.model}, "algorithm": {"name": answers.algorithm},
        "data": data(answers.data or ""), "rewards": [reward(answers)], "rollout": {"engines": engines},
        "trainer": {"gpus": max(1, gpus - engines) if answers.separated else gpus, "steps": answers.steps},
        "placement": {"mode": "Separated" if answers.separated else "Colocated"},
        "checkpoint": {"claim": {"size": answers.storage}},
    }  # fmt: skip


def data(given: str) -> Raw:
    kind, _, task = given.partition(":")
    if kind == "gym" and task:
        return {"reasoningGym": {"task": task}}
    if given.endswith((".jsonl", ".json")):
        return {"jsonl": {"path": given}}
    return {"parquet" if given.endswith(".parquet") else "dataset": {"path": given}}


def reward(answers: Answers) -> Raw:
    given = answers.reward or (GYM if str(answers.data).startswith("gym:") else "")
    if re.match(r"https?://", given):
        return {"name": "service", "type": "http", "url": given}
    function = MATH if given == "math" else given
    if not re.fullmatch(r"[\w.]+:\w+", function):
        raise Wrong(f"--reward {given!r}: write module:function, math, or an http(s) URL")
    name = re.sub(r"[^a-z0-9]+", "-", function.rpartition(":")[2].lower()).strip("-") or "reward"
    return {"name": name, "type": "python", "function": function}


def interactive() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()
