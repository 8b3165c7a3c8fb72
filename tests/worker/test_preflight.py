"""The checks before the first step: the pure ones in tables, the collective ones on gloo ranks, the driver's part with
Ray actors.
"""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from hack.tiny_model import write
from rlhf_api.job import LoRASpec, ModelSpec, PolicySpec
from rlhf_api.memory import GIB, Need, Shape, engine_share, needed_bytes
from rlhf_api.run import RunConfig
from rlhf_worker import preflight
from rlhf_worker.calls import root_cause
from rlhf_worker.errors import BadData, BadSpec, DeadlineExceeded, PreflightFailed, Problems, RewardFailed
from rlhf_worker.rewards.attempt import BACKOFF_LIMIT
from rlhf_worker.storage import Store
from rlhf_worker.trainer import checks
from rlhf_worker.trainer.checks import (
    CHECKS,
    check_memory,
    check_shared_memory,
    engine_memory,
    host_memory,
    parameters,
)
from tests.worker.configs import resolved, run_config
from tests.worker.ranks import over_ranks
from tests.worker.waiting import until

BILLION = 10**9


@pytest.mark.parametrize(
    ("counts", "world", "offload", "expected"),
    [
        ({"policy": BILLION}, 1, False, 20 * BILLION),
        ({"policy": BILLION, "reference": BILLION}, 4, False, 5 * BILLION),
        ({"policy": BILLION, "critic": BILLION, "reference": BILLION}, 1, True, 20 * BILLION),
    ],
)
def test_what_roles_need_at_least(counts: dict[str, int], world: int, offload: bool, expected: int) -> None:
    config = run_config(
        trainer={"steps": 1, "offload": offload},
        algorithm={"name": "ppo", "kl": {"coefficient": 0.1}},
    )
    need = needed_bytes(config, counts, world, 0)
    assert (need.moment, need.bytes) == ("training", expected)


def test_a_node_s_ranks_hold_a_copy_between_them() -> None:
    spec = {"steps": 1, "gpus": 8, "sharding": "Hybrid"}
    config = run_config(trainer=spec, rollout={"maxTokens": 16, "engines": 8}, placement={"gpusPerNode": 4})
    need = needed_bytes(config, {"policy": BILLION}, 8, 0)
    assert need.bytes == 4 * BILLION
    with pytest.raises(BadSpec, match=r": set spec\.trainer\.sharding to Full, set spec\.trainer\.offload, or lower"):
        check_memory(need, GIB, GIB, "GPU x")


def test_frozen_weights_are_counted_in_their_own_type() -> None:
    config = run_config(model={"path": "/m", "lora": {}}, algorithm={"name": "ppo"})
    assert needed_bytes(config, {"policy": BILLION, "critic": BILLION}, 2, 0).bytes == 9 * BILLION
    float32 = run_config(model={"path": "/m", "lora": {}, "dtype": "float32"}, algorithm={"name": "ppo"})
    assert needed_bytes(float32, {"policy": BILLION, "critic": BILLION}, 2, 0).bytes == 10 * BILLION


SHAPE = Shape(layers=36, hidden=4096, heads=32, kv_heads=8, head_dim=128, inner=12288, vocabulary=151936)  # Qwen3-8B
QWEN_8B, QWEN_32B, LLAMA_70B = 8_190_735_360, 32_762_123_264, 70_553_706_496


def job(
    gpus: int, share: float, *, sleep: bool, offload: bool, lora: bool = False, dtype: str = "bfloat16"
) -> RunConfig:
    return run_config(
        model={"path": "/m", "dtype": dtype} | ({"lora": {}} if lora else {}),
        algorithm={"name": "grpo", "kl": {"coefficient": 0.1}},
        rollout={"maxTokens": 16, "engines": gpus, "sleep": sleep},
        placement={"fractions": {"trainer": 0.1, "rollout": share}},
        trainer={"steps": 1, "gpus": gpus, "offload": offload},
    )


@pytest.mark.parametrize(
    ("config", "policy", "fits"),
    [
        # Engine and trainer alternate: neither is counted beside the other.
        (job(8, 0.81, sleep=True, offload=True), QWEN_8B, True),
        (job(8, 0.5, sleep=True, offload=True), QWEN_32B, True),
        (job(4, 0.36, sleep=False, offload=False, lora=True), LLAMA_70B, True),
        (job(8, 0.81, sleep=True, offload=False), QWEN_8B, True),
        (job(8, 0.85, sleep=True, offload=False), QWEN_8B, False),  # weights and moments stay while the engine is awake
        (job(8, 0.81, sleep=False, offload=True), QWEN_8B, False),  # the engine stays while the trainer trains
        (job(8, 0.75, sleep=False, offload=True), QWEN_8B, True),
        (job(8, 0.5, sleep=True, offload=False), QWEN_32B, False),
        (job(8, 0.4, sleep=False, offload=True), QWEN_32B, False),
        (job(8, 0.9, sleep=True, offload=True), QWEN_32B, False),  # each is loaded beside an engine
        (job(8, 0.5, sleep=True, offload=True), LLAMA_70B, False),  # and alone it does not fit either
        (job(4, 0.36, sleep=False, offload=False, lora=True, dtype="float32"), LLAMA_70B, False),
        (job(2, 0.36, sleep=True, offload=True, lora=True), LLAMA_70B, False),
    ],
)
def test_jobs_that_fit_80_gib_cards_are_let_through_and_others_are_not(
    config: RunConfig, policy: int, fits: bool
) -> None:
    roles = {"policy": policy} if config.reference_in_policy else {"policy": policy, "reference": policy}
    total = int(79.6 * GIB)
    need = needed_bytes(config, roles, config.trainer.gpus, int(engine_share(config) * total))
    if fits:
        check_memory(need, total, total, "GPU x")
        return
    with pytest.raises(BadSpec, match=r"GPU x has 79\.6 GiB, but while \w+ the trainer's roles need at least"):
        check_memory(need, total, total, "GPU x")


def on_a_card(monkeypatch: pytest.MonkeyPatch, free: int, total: int) -> None:
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(
        get_device_properties=lambda index: SimpleNamespace(uuid="u"), mem_get_info=lambda: (free, total),
    ))  # fmt: skip


@pytest.mark.parametrize(("rollout", "told"), [
    ({}, "each GPU: an engine gets 62.4 of 80.0 GiB, about "), ({"engine": "hf"}, ""),
])  # fmt: skip
def test_a_rank_says_what_its_gpu_holds_and_asks_for_no_room_of_an_engine_that_is_not_there(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rollout: dict[str, Any], told: str
) -> None:
    config = resolved(model={"path": str(tiny), "dtype": "float32"}, rollout={"maxTokens": 16, **rollout}).on("cuda")
    held: Any = SimpleNamespace(config=config, rank=0, world=1, device=torch.device("cuda"), names=["policy"])
    on_a_card(monkeypatch, 80 * GIB, 80 * GIB)
    CHECKS["Memory"](held)
    out = capsys.readouterr().out
    assert out.startswith(told) and bool(out) == bool(told)
    monkeypatch.setattr(checks, "MEMORY_WAIT_SECONDS", 0.0)
    on_a_card(monkeypatch, 40 * GIB, 80 * GIB)
    if told:
        with pytest.raises(PreflightFailed, match=r"GPU u has 40\.0 GiB free of 80\.0, but while generating"):
            CHECKS["Memory"](held)
    else:
        CHECKS["Memory"](held)


def need(roles: int, engine: int) -> Need:
    return Need("training", roles * GIB, engine * GIB, "lower spec.x")


def test_memory_that_is_there_is_enough() -> None:
    check_memory(need(30, 50), 80 * GIB, 140 * GIB, "GPU x")


def test_memory_that_something_else_holds_may_come_back() -> None:
    words = (
        r"GPU x has 60\.0 GiB free of 140\.0, but while training the trainer's roles need at least 30\.0 GiB and "
        r"the engine takes 50\.0 GiB: something else"
    )
    with pytest.raises(PreflightFailed, match=words):
        check_memory(need(30, 50), 60 * GIB, 140 * GIB, "GPU x")


def test_what_can_never_fit_is_a_wrong_spec() -> None:
    with pytest.raises(BadSpec, match=r"has 140\.0 GiB, but .* need at least 100\.0 GiB.*: lower spec\.x"):
        check_memory(need(100, 50), 140 * GIB, 140 * GIB, "GPU x")


@pytest.mark.parametrize(("config", "moment", "fix"), [
    (job(8, 0.9, sleep=True, offload=False), "generating", "raise spec.trainer.gpus, set spec.trainer.offload, or "
        "lower spec.placement.fractions.rollout"),
    (job(2, 0.1, sleep=True, offload=True), "training", "raise spec.trainer.gpus, or lower the size of the model"),
    (job(8, 0.9, sleep=False, offload=True), "training", "raise spec.trainer.gpus, remove spec.rollout.sleep, or lower "
        "spec.placement.fractions.rollout"),
    (run_config(rollout={"maxTokens": 16, "sleep": True, "engineArgs": {"gpu_memory_utilization": 0.99}}),
     "generating", "raise spec.trainer.gpus, set spec.trainer.offload, or lower "
        "spec.rollout.engineArgs.gpu_memory_utilization"),
])  # fmt: skip
def test_the_fields_to_change_are_those_of_the_worst_moment(config: RunConfig, moment: str, fix: str) -> None:
    total = int(79.6 * GIB)
    found = needed_bytes(config, {"policy": QWEN_8B}, config.trainer.gpus, int(engine_share(config) * total))
    assert (found.moment, found.fix) == (moment, fix)


def test_the_job_of_the_defaults_fits_80_gib_cards() -> None:
    config = run_config(
        algorithm={"name": "grpo", "kl": {"coefficient": 0.1}}, trainer={"steps": 1, "gpus": 8},
        rollout={"maxTokens": 16, "engines": 8, "sleep": True},
    )
    total = int(79.1 * GIB)
    for roles in ({"policy": QWEN_8B}, {"policy": QWEN_8B, "reference": QWEN_8B}):
        check_memory(needed_bytes(config, roles, 8, int(engine_share(config) * total)), total, total, "GPU x")


@pytest.mark.parametrize(("changes", "share"), [
    ({}, 0.78), ({"placement": {"mode": "Separated"}}, 0.9),
    ({"rollout": {"maxTokens": 16, "engineArgs": {"gpu_memory_utilization": 0.3}}}, 0.3),
])  # fmt: skip
def test_an_engine_has_its_fraction_of_the_memory_and_alone_what_vllm_takes(
    changes: dict[str, Any], share: float
) -> None:
    assert engine_share(run_config(**changes)) == share


def test_an_engine_s_memory_in_words_and_one_that_its_weights_exceed() -> None:
    assert engine_memory(job(8, 0.8, sleep=True, offload=False), QWEN_8B, SHAPE, int(79.1 * GIB)) == (
        "an engine gets 63.3 of 79.1 GiB, about 316,000 tokens of KV cache"
    )
    own = run_config(rollout={"maxTokens": 16, "engineArgs": {"quantization": "fp8", "gpu_memory_utilization": 0.1}})
    assert engine_memory(own, QWEN_8B, SHAPE, 80 * GIB) == "an engine gets 8.0 of 80.0 GiB"
    words = (r"spec\.placement\.fractions\.rollout is 0\.1, 8\.0 of 80\.0 GiB, but of an engine the weights alone take "
             r"15\.3: raise it, or spec\.rollout\.tensorParallelSize")
    with pytest.raises(BadSpec, match=words):
        engine_memory(job(8, 0.1, sleep=True, offload=False), QWEN_8B, SHAPE, 80 * GIB)


@pytest.mark.parametrize(
    ("size", "device", "world", "enough"),
    [(64 << 20, "cuda", 1, True), (64 << 20, "cuda", 8, False), (2 << 30, "cuda", 8, True), (64 << 20, "cpu", 2, True)],
)
def test_shared_memory(size: int, device: str, world: int, enough: bool) -> None:
    if enough:
        check_shared_memory(size, device, world)
        return
    with pytest.raises(PreflightFailed, match=r"/dev/shm has 64 MiB, 256 MiB are needed: mount an emptyDir"):
        check_shared_memory(size, device, world)


def test_the_hosts_memory() -> None:
    assert host_memory("MemTotal:  2048 kB\nMemFree:  1 kB\nMemAvailable:  1024 kB\nBuffers: 7 kB\n") == (
        1 << 20,
        2 << 20,
    )


def test_parameters_are_counted_without_loading_them(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write(tmp_path)
    count = AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters()
    assert parameters(ModelSpec(path=str(tmp_path), dtype="float32")) == count
    assert parameters(PolicySpec(path=str(tmp_path), lora=LoRASpec(target_modules=("q_proj",)))) == count


def rank_of_two(rank: int, world: int, tmp_path: Path, model: Path, case: str) -> str:
    """What it was told."""
    root = tmp_path / ("run" if case != "apart" else f"run-{rank}")
    if case == "blocked":
        (tmp_path / "file").touch()
        root = tmp_path / "file" / "run"
    config = run_config(model={"path": str(model), "dtype": "float32"})
    held: Any = SimpleNamespace(
        config=config, rank=rank, world=world, device=torch.device("cpu"), names=["policy"], store=Store(str(root))
    )
    checks.REDUCE_SECONDS = 1.0
    told = ""
    try:
        for name, check in CHECKS.items() if not (case == "hang" and rank == 1) else ():
            last = name
            check(held)
    except PreflightFailed as error:
        told = f"{last}: {error}"
    (tmp_path / f"{case}-{rank}").touch()
    until(
        lambda: all((tmp_path / f"{case}-{r}").exists() for r in range(world)), 120
    )  # a rank that is gone would end the other's wait
    return told


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("well", ""),
        (
            "apart",
            "CheckpointPath: spec.checkpoint.path ({root}/run-1) is another directory in each trainer pod: mount",
        ),
        (
            "blocked",
            "CheckpointPath: spec.checkpoint.path ({root}/file/run) cannot be written: [Errno 20] Not a directory",
        ),
        ("hang", "Reduce: an all-reduce over 2 trainer ranks did not end in 1 s"),
    ],
)
def test_ranks_together(tmp_path: Path, case: str, told: str) -> None:
    write(tmp_path / "model")
    found = over_ranks(2, rank_of_two, tmp_path, tmp_path / "model", case)
    expected = told.format(root=tmp_path)
    assert found == ["", ""] if not told else any(text.startswith(expected) for text in found), found


class Actor:
    """A rank, the feed or an engine: `ailing` names what goes wrong in it."""

    def __init__(self, *ailing: str) -> None:
        self.ailing = ailing
        self.asked: list[str] = []

    def _fail(self, name: str, error: Exception) -> None:
        if f"{name} hangs" in self.ailing:
            raise Hangs
        if name in self.ailing:
            raise error

    def open(self) -> None:
        self._fail("Data", BadData("data.jsonl, line 3: not JSON"))

    def prepare(self) -> None:
        self._fail("EngineArguments", BadSpec("spec.rollout.engineArgs.max_model_len: a text"))

    def join(self) -> None:
        self._fail("Join", RuntimeError("no rendezvous"))

    def preflight(self, check: str) -> None:
        self.asked.append(check)
        kind = BadSpec if check in ("Model", "Memory") else PreflightFailed
        self._fail(check, kind(f"{check} is wrong"))

    def try_rewards(self) -> None:
        self._fail("Rewards", RewardFailed("rewards[r] failed once: 'half a pair \ud800'"))


class Hangs(Exception):
    """Stands for a call that does not come back."""


class Told:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}

    def update(self, synced: Any = None, **fields: Any) -> None:
        self.fields |= fields


class Near:
    """An actor in this process, and its calls: each is done at once, or never."""

    def __init__(self, actor: Actor) -> None:
        self.actor = actor

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *args: NearCall(getattr(self.actor, method), args))


class NearCall:
    def __init__(self, method: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.error: Exception | None = None
        try:
            method(*args)
        except Exception as error:
            self.error = error


class NearRay:
    """Of Ray what preflight uses, with a clock of its own."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def wait(self, calls: list[NearCall], num_returns: int, timeout: float) -> tuple[list[NearCall], list[NearCall]]:
        done = [call for call in calls if not isinstance(call.error, Hangs)][:num_returns]
        self.now += 0.01 if done else max(timeout, 0.01)
        return done, [call for call in calls if call not in done]

    def get(self, call: NearCall) -> None:
        if call.error is not None:
            raise call.error


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> NearRay:
    fake = NearRay()
    monkeypatch.setattr(preflight, "ray", fake)
    monkeypatch.setattr(preflight, "time", fake)
    return fake


def tried(make: Callable[..., Any], reporter: Told, known: Problems, *ailing: str, **spec: Any) -> None:
    """A preflight of two ranks, a feed and an engine, one rank sane; what is ailing hangs or fails in the others."""
    feed, engine, sane, rank = (make(*each) for each in (ailing, ailing, (), ailing))
    opening = {
        "Data": [feed.open.remote()],
        "EngineArguments": [engine.prepare.remote()],
        "Join": [sane.join.remote(), rank.join.remote()],
    }
    config = run_config(**spec)
    preflight.preflight(config, opening, [sane, rank], feed, reporter, known, 1800.0)  # type: ignore[arg-type]


def by(*ailing: str) -> Near:
    return Near(Actor(*ailing))


def test_the_checks_that_passed_are_told(near: NearRay) -> None:
    told = Told()
    tried(by, told, Problems())
    assert told.fields["preflight"].failed is None
    names = [one.split()[0] for one in told.fields["preflight"].message.split(", ")]
    assert names == ["Data", "EngineArguments", "Join", *CHECKS, "Rewards"]


@pytest.mark.parametrize(
    ("ailing", "kind", "words"),
    [
        ("Reduce", PreflightFailed, "PreflightFailed: Reduce is wrong"),
        ("Join", RuntimeError, "RuntimeError: no rendezvous"),
        ("Data", BadData, "BadData: data.jsonl, line 3: not JSON"),
        ("Rewards", RewardFailed, "RewardFailed: rewards[r] failed once: 'half a pair \\ud800'"),
    ],
)
def test_one_fault_is_told_by_the_name_of_its_check(
    near: NearRay, ailing: str, kind: type[Exception], words: str
) -> None:
    told = Told()
    with pytest.raises(kind):
        tried(by, told, Problems(), ailing)
    assert (told.fields["preflight"].failed, told.fields["preflight"].message) == (ailing, words)


ALL = ("Data", "EngineArguments", "Model", "Memory", "CheckpointPath", "Rewards")
LINES = [
    "BadSpec: spec.weightSync.backend is nccl",
    "BadSpec: spec.rollout.engineArgs.max_model_len: a text",
    "BadSpec: Model is wrong",
    "BadSpec: Memory is wrong",
    "BadData: data.jsonl, line 3: not JSON",
    "PreflightFailed: CheckpointPath is wrong",
]  # a reward is tried when all else is right


def assert_all_is_told(make: Callable[..., Any]) -> None:
    told, known = Told(), Problems()
    with known:
        raise BadSpec("spec.weightSync.backend is nccl")
    with pytest.raises(BadSpec) as error:
        tried(make, told, known, *ALL)
    first, *lines = str(root_cause(error.value)).splitlines()
    assert first == "6 things are wrong:" and told.fields["preflight"].failed == "Spec"
    found = [line.partition(" ")[2].split(": ")[:2] for line in sorted(lines)]
    expected = [line.split(": ")[:2] for line in LINES]
    assert sorted(found) == sorted(expected) and [kind for kind, _ in found] == [kind for kind, _ in expected]


def test_all_that_is_wrong_is_told_at_once_and_the_hardest_decides(near: NearRay) -> None:
    assert_all_is_told(by)


@pytest.mark.ray
def test_all_that_is_wrong_is_told_at_once_by_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "WRONG_SECONDS", 400.0)  # no machine is too busy to tell all
    monkeypatch.setattr(preflight, "DEADLINE_SECONDS", 400.0)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        _temp_dir=f"/tmp/rp-{os.getpid()}",
        log_to_driver=False,
    )
    try:
        assert_all_is_told(ray.remote(num_cpus=0)(Actor).remote)
    finally:
        ray.shutdown()


@pytest.mark.parametrize(
    ("ailing", "kind", "words", "seconds"),
    [
        (["Data hangs"], DeadlineExceeded, "preflight check Data: 1 of 1 not done after 1800 s", 1800),
        (["SharedGPU hangs", "Memory"], DeadlineExceeded, "preflight check SharedGPU: 1 of 2 not done after 60 s", 60),
        (["Rewards hangs"], DeadlineExceeded, "preflight check Rewards: 1 of 1 not done after 210 s", 210),
        (
            ["EngineArguments hangs", "Memory", "Data"],
            BadSpec,
            "Memory is wrong",
            50,
        ),  # who has not answered is not waited for
        (["Join hangs", "Data"], BadData, "line 3", 50),
        (["Reduce hangs", "Data"], BadData, "line 3", 50),
    ],
)
def test_what_hangs_is_named_and_does_not_keep_back_what_is_wrong(
    near: NearRay, ailing: list[str], kind: type[Exception], words: str, seconds: float
) -> None:
    with pytest.raises(kind, match=words):
        tried(by, Told(), Problems(), *ailing)
    assert near.now - 100.0 == pytest.approx(seconds, abs=1.0)


def test_ranks_are_tried_while_engines_and_feed_still_open(near: NearRay) -> None:
    """What hangs in this world has not ended when anything else does."""
    made: list[Near] = []

    def make(*ailing: str) -> Near:
        made.append(by(*ailing))
        return made[-1]

    with pytest.raises(PreflightFailed, match="2 things are wrong"):
        tried(make, Told(), Problems(), "EngineArguments hangs", "Data hangs")
    assert [rank.actor.asked for rank in made[2:]] == [list(CHECKS)] * 2


def test_a_rewards_own_deadline_counts_and_not_that_of_all_checks() -> None:
    reward = {"name": "r", "type": "python", "function": "a:b", "timeoutSeconds": 300, "retries": 1}
    (spec,) = run_config(rewards=[reward]).rewards
    assert preflight.reward_seconds(spec) == 2 * 330 + 30


def test_a_reward_is_waited_for_on_each_source_that_it_judges_and_on_each_set_of_its_own(near: NearRay) -> None:
    def reward(name: str, timeout: float) -> dict[str, Any]:
        return {"name": name, "type": "python", "function": "a:b", "timeoutSeconds": timeout, "retries": 0}

    def source(name: str, *rewards: str) -> dict[str, Any]:
        return {"name": name, "jsonl": {"path": "/x"}, "weight": 1, "rewards": list(rewards)}

    data = {"sources": [source("m", "a"), source("n", "a", "b")]}
    held_out = {"name": "e", "data": {"jsonl": {"path": "/x"}}, "rewards": [reward("own", 1000)]}
    spec: dict[str, Any] = {"rewards": [reward("a", 10), reward("b", 100)], "data": data, "evaluation": [held_out]}
    with pytest.raises(DeadlineExceeded, match="Rewards: 1 of 1 not done"):
        tried(by, Told(), Problems(), "Rewards hangs", **spec)
    slack = BACKOFF_LIMIT + preflight.REWARD_SLACK_SECONDS
    assert near.now - 100.0 == pytest.approx(10 + 10 + 100 + 1000 + 4 * slack, abs=1.0)
