"""`kubectl rlhf init`: a valid manifest from a few answers."""

import ast
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from rlhf_api.job import AlgorithmSpec
from rlhf_api.parse import InvalidJob, parse_job
from rlhf_cli.convert import ordered
from rlhf_cli.convert_read import number
from rlhf_cli.convert_rules import IMAGE
from rlhf_cli.exits import Wrong
from rlhf_cli.manifest import hinted, text_of
from rlhf_client.errors import nearest
from rlhf_client.files import MOUNT

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
    mounts: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()


# Flag, question, and the answer that stands there.
QUESTIONS: dict[str, tuple[str, str]] = {
    "name": ("Name of the job", "first"),
    "model": ("Model: hub id, or a directory inside the pods", "Qwen/Qwen3-0.6B"),
    "data": ("Prompts: .jsonl or .parquet file, hub dataset, or gym:<task>", "gym:basic_arithmetic"),
    "reward": ("Reward: .py file that defines reward, module:function, math, or an http(s) URL", ""),
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
        "spec": ordered(reduce(_set, answers.sets, spec(answers))),
    }
    try:
        parse_job(raw)
    except InvalidJob as error:
        raise Wrong("\n  ".join(["this makes no valid job:", *(hinted(one, raw) for one in error.problems)])) from None
    text: str = yaml.dump(raw, Dumper=Plain, sort_keys=False, allow_unicode=True, width=120)
    data = answers.data or ""
    run = f"kubectl rlhf run -f FILE{f' --with {data}' if _here(data) else ''}"
    return f"# kubectl rlhf explain -f FILE tells what it takes, {run} runs it.\n{text}"


class Plain(yaml.SafeDumper):
    """Without aliases, and with texts of several lines as such."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


Plain.add_representer(str, Plain.represent_str)


def _set(made: Raw, given: str) -> Raw:
    """With one field more, such as `rollout.maxTokens=16`. Raises Wrong."""
    path, sign, value = given.partition("=")
    *parents, last = path.removeprefix("spec.").split(".")
    node: Any = made
    for part in parents:
        node = node.setdefault(part, {}) if isinstance(node, dict) else None
    if not (sign and last and isinstance(node, dict)):
        raise Wrong(f"--set {given}: write a field and its value, such as rollout.maxTokens=2048")
    try:
        node[last] = number(yaml.safe_load(value))
    except yaml.YAMLError:
        raise Wrong(f"--set {given}: {value} is no YAML") from None
    return made


def spec(answers: Answers) -> Raw:
    """Half of the GPUs are the engines' where they have their own."""
    gpus = answers.gpus or 1
    engines = max(1, gpus // 2) if answers.separated else gpus
    kinds = ("head", "trainer", *(["rollout"] if answers.separated else []))
    return {
        "image": answers.image, "model": {"path": answers.model}, "algorithm": {"name": answers.algorithm},
        "data": data(answers.data or ""), "rewards": [reward(answers)], "rollout": {"engines": engines},
        "trainer": {"gpus": max(1, gpus - engines) if answers.separated else gpus, "steps": answers.steps},
        "placement": {"mode": "Separated" if answers.separated else "Colocated"},
        "checkpoint": {"claim": {"size": answers.storage}},
        **({"pods": {kind: mounted(answers.mounts) for kind in kinds}} if answers.mounts else {}),
    }  # fmt: skip


def mounted(given: Sequence[str]) -> Raw:
    """Volumes, and where pods read them. Raises Wrong."""
    made: Raw = {"volumes": [], "volumeMounts": []}
    for at, one in enumerate(given):
        source, _, path = one.rpartition(":")
        if not source or not path.startswith("/"):
            raise Wrong(f"--mount {one}: write CLAIM:/path, or /directory/of/the/node:/path")
        volume: Raw = {"hostPath": {"path": source, "type": "Directory"}} if source.startswith("/") else {
            "persistentVolumeClaim": {"claimName": source, "readOnly": True}}
        made["volumes"].append({"name": f"mount-{at}", **volume})
        made["volumeMounts"].append({"name": f"mount-{at}", "mountPath": path, "readOnly": True})
    return made


def data(given: str) -> Raw:
    kind, _, task = given.partition(":")
    if kind == "gym" and task:
        return {"reasoningGym": {"task": task}}
    form = "jsonl" if given.endswith((".jsonl", ".json")) else "parquet" if given.endswith(".parquet") else "dataset"
    if _here(given):
        if not Path(given).is_file():
            raise Wrong(f"--data {given}: no such file here; a path inside the pods begins with /")
        return {form: {"path": f"{MOUNT}/{Path(given).name}"}}
    return {form: {"path": given}}


def _here(data: str) -> bool:
    """Whether it names a file of this machine: one of the pods has an absolute path."""
    return data.endswith((".jsonl", ".json", ".parquet")) and not re.match(r"/|[a-z0-9+.-]+://", data)


def reward(answers: Answers) -> Raw:
    given = answers.reward or (GYM if str(answers.data).startswith("gym:") else "")
    if re.match(r"https?://", given):
        return {"name": "service", "type": "http", "url": given}
    if given.endswith(".py"):
        return {"name": _name(Path(given).stem), "type": "python", "code": source(Path(given))}
    function = MATH if given == "math" else given
    if not re.fullmatch(r"[\w.]+:\w+", function):
        raise Wrong(f"--reward {given!r}: write a .py file, module:function, math, or an http(s) URL")
    return {"name": _name(function.rpartition(":")[2]), "type": "python", "function": function}


def _name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "reward"


def source(path: Path) -> str:
    """Of a reward function. Raises Wrong where the file defines none that is called `reward`."""
    text = text_of(path)
    try:
        defined = [one.name for one in ast.parse(text).body if isinstance(one, ast.FunctionDef)]
    except SyntaxError as error:
        raise Wrong(f"--reward {path}, line {error.lineno}: {error.msg}") from None
    if "reward" not in defined:
        raise Wrong(f"--reward {path} defines {', '.join(defined) or 'no function'}: it must define reward(prompt, "
            "completion, **row)")
    return text


def interactive() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()
