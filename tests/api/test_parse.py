"""From text to a job or a list of problems, and from a job to a run config and back."""

import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_api.parse import InvalidJob, load_job, parse_job, parse_lenient
from rlhf_api.run import RunConfig, resolve
from tests.api.specs import a_job


def problems(raw: dict[str, Any]) -> list[str]:
    with pytest.raises(InvalidJob) as caught:
        parse_job(raw)
    return caught.value.problems


@pytest.mark.parametrize(
    ("changes", "field", "word"),
    [
        ({"trainer__learninRate": 1e-6}, "spec.trainer.learninRate", "unknown field"),
        ({"trainer__learning_rate": 1e-6}, "spec.trainer.learning_rate", "unknown field"),
        ({"data__jsonl__pth": "x"}, "spec.data.jsonl.pth", "unknown field"),
        ({"algorithm__name": "gripo"}, "spec.algorithm.name", "grpo"),
        ({"placement__mode": "Shared"}, "spec.placement.mode", "Colocated"),
        ({"image": ""}, "spec.image", "at least 1 character"),
        ({"trainer__steps": 0}, "spec.trainer.steps", "greater than or equal to 1"),
        ({"rewards": []}, "spec.rewards", "at least 1 item"),
        ({"rewards": [{"name": "Bad_Name", "type": "python", "function": "m:f"}]}, "spec.rewards[0].name", "match"),
        ({"rewards": [{"name": "a", "type": "http", "url": "ftp://x"}]}, "spec.rewards[0].url", "match"),
        ({"checkpoint__path": "relative"}, "spec.checkpoint.path", "match"),
    ],
)
def test_a_problem_names_its_field(changes: dict[str, Any], field: str, word: str) -> None:
    (problem,) = problems(a_job(**changes))
    assert problem.startswith(f"{field}: ")
    assert word in problem


def test_all_problems_are_told_at_once() -> None:
    assert len(problems(a_job(trainer__oops=1, rollout__oops=1, image=""))) == 3


@pytest.mark.parametrize(("key", "value"), [("apiVersion", "rlhf.dev/v2"), ("kind", "RayJob")])
def test_another_kind_or_version_is_refused(key: str, value: str) -> None:
    (problem,) = problems({**a_job(), key: value})
    assert problem.startswith(f"{key}: ")


def test_broken_rules_are_problems() -> None:
    (problem,) = problems(a_job(rollout__engines=2))
    assert problem.startswith("spec.trainer.gpus: ")


def test_metadata_and_status_may_hold_what_the_api_server_adds() -> None:
    raw = a_job()
    raw["metadata"] |= {"uid": "u", "managedFields": [], "resourceVersion": "7"}
    raw["status"] = {"phase": "Running", "future": 1}
    job = parse_job(raw)
    assert (job.metadata.uid, job.metadata.resource_version, job.status["future"]) == ("u", "7", 1)


def test_pod_overrides_keep_unknown_fields() -> None:
    job = parse_job(a_job(pods__trainer={"nodeSelector": {"gpu": "h200"}, "env": [{"name": "A", "value": "1"}]}))
    assert job.spec.pods.trainer.to_dict()["nodeSelector"] == {"gpu": "h200"}


UNKNOWN: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    ({"trainer__learninRate": 1e-6}, ["spec.trainer.learninRate"]),
    ({"trainer__learning_rate": 1e-6}, ["spec.trainer.learning_rate"]),
    (
        {"fleet": {"of": [1]}, "data__jsonl__pth": "x", "algorithm__gae__mu": 1},
        ["spec.algorithm.gae.mu", "spec.data.jsonl.pth", "spec.fleet"],
    ),
    ({
        "rewards": [
            {"name": "a", "type": "python", "function": "m:f", "x": 1, "y": 2},
            {"name": "b", "type": "python", "function": "m:f", "x": {}}
        ]
    },
     ["spec.rewards[0].x", "spec.rewards[0].y", "spec.rewards[1].x"]),
    (
        {"evaluation": [{"name": "e", "data": {"jsonl": {"path": "p", "z": 0}, "q": 0}}]},
        ["spec.evaluation[0].data.jsonl.z", "spec.evaluation[0].data.q"],
    ),
    ({"pods__trainer": {"runtimeClassName": "kata"}, "pods__sidecar": {}}, ["spec.pods.sidecar"]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "ignored"), UNKNOWN, ids=lambda value: str(value)[:60])
def test_unknown_fields_are_left_out_and_named(changes: dict[str, Any], ignored: list[str]) -> None:
    raw = a_job(**changes)
    before = str(raw)
    read = parse_lenient(raw)
    assert (sorted(read.ignored), read.problems) == (ignored, [])
    assert read.job is not None
    assert read.job.spec.image == "rlhf-worker:dev"
    assert str(raw) == before, "what was given is left as it was"


def test_unknown_fields_do_not_hide_what_is_wrong() -> None:
    read = parse_lenient(a_job(trainer={"steps": 0, "new": 1}, fleet=1))
    assert (read.job, sorted(read.ignored)) == (None, ["spec.fleet", "spec.trainer.new"])
    assert [problem.split(":")[0] for problem in read.problems] == ["spec.trainer.steps"]


@pytest.mark.parametrize(("part", "field"), [("rollout", "engineArgs"), ("pods", "trainer"), ("pods", "head")])
def test_what_is_nested_without_end_is_refused(part: str, field: str) -> None:
    raw, deep = a_job(rollout={}, pods={}), dict[str, Any]()
    for _ in range(5000):
        deep = {"affinity": [deep]}
    raw["spec"][part][field] = {"env": [deep]} if field == "head" else deep
    (problem,) = parse_lenient(raw).problems
    assert "is nested too deeply: at most 32 levels" in problem


def test_a_job_that_breaks_rules_is_read_and_its_problems_told() -> None:
    read = parse_lenient(a_job(rollout__engines=2, pods__head={"containers": []}))
    assert read.job is not None
    assert [problem.split(":")[0] for problem in read.problems] == ["spec.trainer.gpus", "spec.pods.head.containers"]


@pytest.mark.parametrize("raw", [None, [], "job", 7, {}, {"spec": 3}, {"metadata": [], "spec": []}], ids=str)
def test_what_is_no_job_at_all_is_a_problem(raw: object) -> None:
    read = parse_lenient(raw)
    assert read.job is None
    assert read.problems


def load(tmp_path: Path, text: str) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(InvalidJob) as caught:
        load_job(path)
    return str(caught.value)


def test_files_that_hold_no_single_job(tmp_path: Path) -> None:
    assert "not YAML" in load(tmp_path, "a: [")
    assert "holds 0 RLHFJobs" in load(tmp_path, "kind: Pod\n")
    assert "holds 2 RLHFJobs" in load(tmp_path, "kind: RLHFJob\n---\nkind: RLHFJob\n")
    assert "holds 0 RLHFJobs" in load(tmp_path, "just text\n")
    with pytest.raises(InvalidJob, match=r"absent\.yaml: No such file"):
        load_job(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    "changes",
    [{}, {"placement__mode": "Separated", "rollout__engineArgs": {"max_model_len": 64, "quantization": None}}]
)
def test_a_run_config_survives_its_file(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = resolve(parse_job(a_job(**changes)))
    path = tmp_path / "run.yaml"
    path.write_text(config.dump())
    assert RunConfig.read(path) == config


def test_the_sampling_seed_falls_back_to_the_jobs() -> None:
    assert resolve(parse_job(a_job(trainer__seed=7))).sampling_seed == 7
    assert resolve(parse_job(a_job(trainer__seed=7, rollout__seed=0))).sampling_seed == 0


@pytest.mark.parametrize(
    ("changes", "inside"),
    [
        ({}, True),
        ({"reference": {"model": {"path": "some/model"}}}, True),
        ({"reference": {"model": {"path": "other/model"}}}, False),
        ({"reference": {"gpus": 1}}, False),
        ({"model": {"path": "some/model"}}, False),
        ({"algorithm": {"kl": {"coefficient": 0}}}, False),
    ],
    ids=str,
)
def test_a_reference_of_the_policys_base_on_its_ranks_is_the_policy_without_adapters(
    changes: dict[str, Any], inside: bool,
) -> None:
    given: dict[str, Any] = {
        "model": {"path": "some/model", "lora": {}}, "algorithm": {"kl": {"coefficient": 0.1}}, **changes,
    }
    config = resolve(parse_job(a_job(**given)))
    assert config.reference_in_policy is inside
    assert "reference" not in config.roles or not hasattr(config.roles["reference"], "lora")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 0}, "model.lora.rank"), ({"rank": 513}, "model.lora.rank"), ({"alpha": 0}, "model.lora.alpha"),
        ({"targetModules": []}, "model.lora.targetModules"),
        ({"targetModules": ["a.b"]}, r"model.lora.targetModules\[0\]"),
    ],
)  # fmt: skip
def test_adapters_that_cannot_be(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidJob, match=rf"spec\.{message}"):
        parse_job(a_job(model__lora=lora))


JUDGE = {"name": "j", "type": "judge", "url": "http://judge/", "judge": {"model": "m", "prompt": "rate {completion}"}}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("score (", "no regular expression"), (
        "(" * 500 + ")" * 500, "no regular expression",
    ), ("(a{99999999999})", "no regular expression"), ("score", "exactly one group"), (r"(a)(\d)", r"it has 2; write "
        r"\(\?:")],
)
def test_a_judges_pattern_must_have_one_group(pattern: str, message: str) -> None:
    read = parse_lenient(
        a_job(rewards=[{**JUDGE, "judge": {**JUDGE["judge"], "pattern": pattern}}])  # type: ignore[dict-item]
    )
    assert read.job is not None, "what else the job says is known"
    (problem,) = read.problems
    assert re.fullmatch(rf"spec\.rewards\[0\]\.judge\.pattern: .*{message}.*", problem)
