"""Specs for the tests: the smallest valid one, and one that breaks each rule and no other."""

import copy
from typing import Any

from rlhf_api.rules import MOST_GPUS, RULES, Rule

Object = dict[str, Any]


def minimal_spec() -> Object:
    """Only what has no default."""
    return {
        "image": "rlhf-worker:dev",
        "model": {"path": "some/model"},
        "data": {"jsonl": {"path": "/data/prompts.jsonl"}},
        "rewards": [{"name": "exact", "type": "python", "function": "package.module:score"}],
        "trainer": {"steps": 10},
    }


def a_job(name: str = "sample", **changes: Any) -> Object:
    """An RLHFJob of the minimal spec. A change is named by its path with `__` for a dot: `trainer__gpus=2`; None
    removes.
    """
    job: Object = {
        "apiVersion": "rlhf.dev/v1alpha1",
        "kind": "RLHFJob",
        "metadata": {"name": name, "namespace": "default"},
        "spec": minimal_spec(),
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = job["spec"]
        for part in parents:
            node = node.setdefault(part, {})
        if value is None:
            node.pop(last)
        else:
            node[last] = copy.deepcopy(value)
    return job


def rule(cel_part: str) -> Rule:
    """The one rule whose CEL holds this text."""
    (found,) = [rule for rule in RULES if cel_part in rule.cel]
    return found


def without(node: Object, key: str) -> Object:
    return {name: value for name, value in node.items() if name != key}


MODEL: Object = {"name": "rm", "type": "model", "model": {"path": "/rm"}}
PYTHON: Object = {"name": "a", "type": "python", "function": "m:f"}
JUDGE: Object = {
    "name": "j", "type": "judge", "url": "http://judge/v1/chat/completions",
    "judge": {"model": "m", "prompt": "rate {completion}"},
}
EVALUATION: Object = {"name": "held-out", "data": {"jsonl": {"path": "/data/test.jsonl"}}}
SOURCE: Object = {"name": "math", "jsonl": {"path": "/data/math.jsonl"}}

# (a part of the rule's CEL, a job that breaks it and nothing else)
BROKEN: list[tuple[str, Object]] = [
    ("self.metadata.name", a_job("a" * 41)),
    ("self.metadata.name", a_job("1st")),
    ("self.metadata.name", a_job("with.dot")),
    ("== self.trainer.gpus", a_job(rollout__engines=2)),
    ("== self.trainer.gpus", a_job(trainer__gpus=4, rollout__engines=1, rollout__tensorParallelSize=2)),
    ("self.rollout.staleness", a_job(rollout__staleness=1)),
    ("r.staleness",
     a_job(rollout={"staleness": 1, "overSampling": 1.5}, placement={"mode": "Separated"})),
    ("r.staleness",
     a_job(rollout={"overSampling": 2, "environment": {"function": "a:B"}})),
    ("r.staleness", a_job(rollout={"overSampling": 2, "engine": "hf"})),
    ("s.stop.size()", a_job(rollout={"overSampling": 2, "sampling": {"stop": ["."]}})),
    ("s.stop.size()", a_job(rollout={"overSampling": 2, "sampling": {"frequencyPenalty": 0.5}})),
    ("has(w.gpus)", a_job(rollout={"overSampling": 2}, rewards=[MODEL])),
    ("self.rollout.engine !=", a_job(rollout__engine="hf", placement__mode="Separated")),
    ("self.rollout.engine !=", a_job(rollout__engine="hf", rollout__engines=2)),
    ("has(self.environment)", a_job(rollout__environment={"maxTurns": 2})),
    ("has(self.environment)", a_job(rollout__environment={"function": "m:E", "code": "class Environment: ..."})),
    ("has(self.topP)", a_job(rollout__sampling={"topP": 0.9})),
    ("has(self.topP)", a_job(rollout__sampling={"minP": 0.1})),
    ("has(self.topP)", a_job(rollout__sampling={"minTokens": 1, "topK": 0})),
    ("has(s.repetitionPenalty)", a_job(rollout__sampling={"frequencyPenalty": 0.1}, algorithm__correction__tokenCap=0)),
    ("has(s.repetitionPenalty)",
     a_job(rollout__sampling={"repetitionPenalty": 1.1}, algorithm__correction__tokenCap=0)),
    ("self.sampling.minTokens <=", a_job(rollout={"maxTokens": 4, "sampling": {"topK": 2, "minTokens": 5}})),
    ("e.sampling.minTokens <=", a_job(evaluation=[{**EVALUATION, "sampling": {"minTokens": 513}}])),
    ("e.sampling.minTokens <=", a_job(evaluation=[{**EVALUATION, "maxTokens": 4, "sampling": {"minTokens": 5}}])),
    ("has(e.environment)", a_job(evaluation=[{**EVALUATION, "environment": {}}])),
    ("self.passAt", a_job(evaluation=[{**EVALUATION, "passAt": [2]}])),
    ("self.passAt", a_job(evaluation=[{**EVALUATION, "samples": 4, "temperature": 1, "majAt": [1, 5]}])),
    ("has(self.answerPattern)", a_job(evaluation=[{**EVALUATION, "answerPattern": "(.)"}])),
    ("exists_one(same", a_job(evaluation=[{**EVALUATION, "rewards": [PYTHON, PYTHON]}])),
    ("r.type != 'model'", a_job(evaluation=[{**EVALUATION, "rewards": [MODEL]}])),
    ("(r.name in", a_job(evaluation=[{**EVALUATION, "rewards": [{**PYTHON, "name": "std"}]}])),
    ("r.type != 'python'", a_job(evaluation=[{**EVALUATION, "rewards": [{"name": "a", "type": "python"}]}])),
    ("r.type != 'http'", a_job(evaluation=[{**EVALUATION, "rewards": [{"name": "a", "type": "http"}]}])),
    ("r.type == 'model'", a_job(evaluation=[{**EVALUATION, "rewards": [{**PYTHON, "gpus": 1}]}])),
    ("!has(r.clip) ||", a_job(evaluation=[{**EVALUATION, "rewards": [{**PYTHON, "clip": {"low": 1, "high": 1}}]}])),
    ("(r, r.scope ==", a_job(evaluation=[{**EVALUATION, "rewards": [{**JUDGE, "scope": "group"}]}])),
    ("r.type != 'judge'", a_job(evaluation=[{**EVALUATION, "rewards": [without(JUDGE, "url")]}])),
    ("r.judge.low",
     a_job(evaluation=[{**EVALUATION, "rewards": [{**JUDGE, "judge": {**JUDGE["judge"], "low": 5, "high": 5}}]}])),
    ("r.judge.prompt",
     a_job(evaluation=[{**EVALUATION, "rewards": [
         {**JUDGE, "judge": {**JUDGE["judge"], "prompt": "rate {prompt}"}},
     ]}])),
    ("self.rollout.minEngines", a_job(rollout__minEngines=2)),
    ("self.placement.fractions.trainer", a_job(rollout__sleep=False)),
    ("self.placement.fractions.trainer",
     a_job(rollout__sleep=False, placement__fractions={"trainer": 0.6, "rollout": 0.5})),
    ("!self.rollout.sleep ||", a_job(rollout__sleep=True, placement__mode="Separated")),
    ("!self.rollout.sleep ||", a_job(rollout__sleep=True, rollout__engine="hf")),
    (
        "self.rollout.tensorParallelSize <=",
        a_job(placement__gpusPerNode=2, rollout__tensorParallelSize=4, trainer__gpus=4),
    ),
    (
        "gpusPerNode || gpus %",
        a_job(placement__mode="Separated", placement__gpusPerNode=4, trainer__gpus=6),
    ),
    (
        "gpusPerNode || gpus %",
        a_job(placement__gpusPerNode=4, trainer__gpus=4, rollout__engines=4, rewards=[{**MODEL, "gpus": 2}]),
    ),
    (
        "self.trainer.sharding",
        a_job(
            placement__gpusPerNode=4, trainer__gpus=6, rollout__engines=6, rewards=[{**MODEL, "gpus": 2}],
            trainer__sharding="Hybrid",
        ),
    ),
    ("self.rollout.engines <=", a_job(placement__mode="Separated", placement__gpusPerNode=4, rollout__engines=5)),
    (
        "self.rollout.engines <=",
        a_job(placement__gpusPerNode=4, rollout__engines=4, rollout__tensorParallelSize=3, trainer__gpus=12),
    ),
    ("gpus % self.trainer.contextParallel", a_job(trainer__gpus=3, rollout__engines=3, trainer__contextParallel=2)),
    (
        "gpus % self.trainer.contextParallel",
        a_job(trainer__gpus=2, rollout__engines=2, trainer__contextParallel=2, rewards=[{**MODEL, "gpus": 1}]),
    ),
    (
        "gpus % self.trainer.contextParallel",
        a_job(
            trainer__contextParallel=2, algorithm__name="ppo", critic={"gpus": 3}, trainer__gpus=2, rollout__engines=2,
        ),
    ),
    (
        "self.trainer.batching",
        a_job(trainer__gpus=2, rollout__engines=2, trainer__contextParallel=2, trainer__batching="padded"),
    ),
    ("promptsPerStep", a_job(rollout__promptsPerStep=1, rollout__samplesPerPrompt=2, trainer__updatesPerStep=3)),
    ("'ipc'", a_job(weightSync__backend="ipc", placement__mode="Separated")),
    ("'ipc'", a_job(weightSync__backend="nccl")),
    ("has(self.model.lora)", a_job(model__lora={}, weightSync__backend="gloo")),
    ("samplesPerPrompt >= 2", a_job(rollout__samplesPerPrompt=1)),
    ("samplesPerPrompt >= 2", a_job(rollout__samplesPerPrompt=1, algorithm__name="rloo")),
    ("bufferTokens <= self.rollout.maxTokens", a_job(algorithm__overlong__bufferTokens=513)),
    ("self.algorithm.advantageNormalization", a_job(algorithm={"name": "ppo", "advantageNormalization": "group"})),
    (
        "!self.algorithm.dynamicSampling.enabled",
        a_job(algorithm={"name": "reinforce++", "dynamicSampling": {"enabled": True}}),
    ),
    ("self.algorithm.dynamicSampling.maxRounds", a_job(algorithm__dynamicSampling__maxRounds=3)),
    (
        "self.algorithm.dynamicSampling.maxRounds",
        a_job(algorithm={"name": "dapo", "dynamicSampling": {"enabled": False, "maxRounds": 3}}),
    ),
    ("self.algorithm.gae.gamma", a_job(algorithm__gae__lambda=0.9)),
    ("self.algorithm.gae.gamma", a_job(algorithm={"name": "rloo", "valueClip": 0.1})),
    ("self.algorithm.clipLow", a_job(algorithm__clipLow=1)),
    ("self.algorithm.dualClip", a_job(algorithm__dualClip=1)),
    ("self.algorithm.dualClip", a_job(algorithm={"name": "cispo", "dualClip": 3})),
    ("self.algorithm.overlong.penalty", a_job(algorithm__overlong__penalty=2)),
    (
        "self.algorithm.overlong.penalty",
        a_job(algorithm={"name": "dapo", "overlong": {"bufferTokens": 0, "penalty": 2}}),
    ),
    ("self.tokenCap", a_job(algorithm__correction__tokenCap=0.5)),
    ("self.tokenCap", a_job(algorithm__correction__sequenceMax=0.99)),
    ("self.algorithm.kl.estimator", a_job(algorithm__kl={"coefficient": 0.1, "estimator": "k1"})),
    (
        "self.algorithm.kl.estimator",
        a_job(algorithm={"name": "ppo", "kl": {"coefficient": 0.1, "estimator": "k1", "place": "loss"}}),
    ),
    ("has(self.target)", a_job(algorithm__kl__target=0.1)),
    ("has(self.target)", a_job(algorithm__kl={"coefficient": 0.1, "horizon": 10})),
    ("has(self.sources)].filter", a_job(data={"chatTemplate": True})),
    ("has(self.sources)].filter", a_job(data__parquet={"path": "/data/prompts.parquet"})),
    ("has(self.sources)].filter", a_job(data__sources=[SOURCE])),
    ("filter(s, s)", a_job(data={"sources": [SOURCE, {"name": "b"}]})),
    ("filter(s, s)", a_job(data={"sources": [{**SOURCE, "parquet": {"path": "/p"}}]})),
    ("twin.name == s.name", a_job(data={"sources": [SOURCE, SOURCE]})),
    ("r.name == n", a_job(data={"sources": [SOURCE, {**SOURCE, "name": "b", "rewards": ["exakt"]}]})),
    ("r.name in s.rewards", a_job(rewards=[PYTHON, JUDGE], data={"sources": [{**SOURCE, "rewards": ["a"]}]})),
    ("!has(self.chatTemplate)", a_job(data__chatTemplate=False, data__tools=[{"type": "function"}])),
    ("!has(self.chatTemplate)", a_job(data__chatTemplate=False, data__chatTemplateKwargs={"enable_thinking": False})),
    ("!has(self.data.chatTemplate)",
     a_job(evaluation=[{**EVALUATION, "data": {**EVALUATION["data"], "chatTemplate": False, "tools": [{}]}}])),
    ("exists_one(other", a_job(rewards=[PYTHON, PYTHON])),
    ("has(self.function)", a_job(rewards=[{"name": "a", "type": "python"}])),
    ("has(self.function)", a_job(rewards=[{**PYTHON, "code": "def reward(prompt, completion, **row): return 0.0"}])),
    ("'http' || has(self.url)", a_job(rewards=[{"name": "a", "type": "http"}])),
    ("(self.name in", a_job(rewards=[{**PYTHON, "name": "std"}])),
    ("!has(self.clip) || self.clip.low <", a_job(rewards=[{**PYTHON, "clip": {"low": 1, "high": 1}}])),
    ("self.scope ==", a_job(rewards=[{**JUDGE, "scope": "group"}])),
    (
        "r.normalize != 'group'",
        a_job(
            rewards=[{**PYTHON, "normalize": "group"}],
            rollout__samplesPerPrompt=1,
            algorithm={"name": "reinforce++"},
        ),
    ),
    ("has(self.url) && has(self.judge)", a_job(rewards=[without(JUDGE, "url")])),
    ("has(self.url) && has(self.judge)", a_job(rewards=[without(JUDGE, "judge")])),
    ("self.judge.low <", a_job(rewards=[{**JUDGE, "judge": {**JUDGE["judge"], "low": 5, "high": 5}}])),
    ("self.judge.prompt", a_job(rewards=[{**JUDGE, "judge": {**JUDGE["judge"], "prompt": "rate {prompt}"}}])),
    ("self.type == 'model'", a_job(rewards=[{"name": "a", "type": "model"}])),
    ("self.type == 'model'", a_job(rewards=[{**PYTHON, "gpus": 1}])),
    ("self.type == 'model'", a_job(rewards=[{**PYTHON, "model": {"path": "/m"}}])),
    ("has(self.critic) || self.algorithm", a_job(critic={})),
    ("has(self.reference) || self.algorithm", a_job(reference={"gpus": 1})),
    ("exists_one(one", a_job(evaluation=[EVALUATION, EVALUATION])),
    ("has(self.data.jsonl)", a_job(evaluation=[{**EVALUATION, "data": {}}])),
    (
        "has(self.data.jsonl)",
        a_job(evaluation=[{**EVALUATION, "data": {**EVALUATION["data"], "parquet": {"path": "/p"}}}]),
    ),
    ("self.samples == 1", a_job(evaluation=[{**EVALUATION, "samples": 2}])),
    (
        f"<= {MOST_GPUS})",
        a_job(
            placement__mode="Separated", rollout__engines=4096, rollout__tensorParallelSize=2, trainer__gpus=8,
            rollout__promptsPerStep=10,
        ),
    ),
    (
        f"<= {MOST_GPUS})",
        a_job(
            trainer__gpus=4096, rollout__engines=4096, rollout__promptsPerStep=4096,
            rewards=[{**MODEL, "gpus": 4096}, {**MODEL, "name": "b", "gpus": 4096}],
        ),
    ),
    *(("self.resourceName.matches", a_job(placement__resourceName=name)) for name in
      (
          "cpu", "memory", "ephemeral-storage", "hugepages-2Mi", "pods", "storage", "kubernetes.io/gpu",
          "requests.nvidia.com/gpu", "nvidia.com/", "/gpu", "a/b/c",
      )),
    ("self.model.source", a_job(model={"path": "Qwen/Qwen3-8B", "source": {"repo": "Qwen/Qwen3-8B"}})),
    ("self.model.source", a_job(rewards=[{**MODEL, "model": {"path": "rm", "source": {"repo": "some/rm"}}}])),
    ("self.model.source",
     a_job(algorithm={"name": "ppo"}, critic={"model": {"path": "c", "source": {"repo": "some/c"}}})),
    *(
        ("self.path.matches", a_job(checkpoint__path=path))
        for path in ("//", "/.", "file:///", "/a/../b", "/a/..", "/a:b", "file://relative")
    ),
    ("!has(self.claim) ||", a_job(checkpoint={"path": "s3://bucket/run", "claim": {"size": "1Gi"}})),
    (
        "self.checkpoint.claim.accessMode",
        a_job(checkpoint__claim={"size": "1Gi"}, trainer__gpus=4, rollout__engines=4, placement__gpusPerNode=2),
    ),
    (
        "self.checkpoint.claim.accessMode",
        a_job(
            checkpoint__claim={"size": "1Gi", "accessMode": "ReadWriteOncePod"}, rewards=[{**MODEL, "gpus": 1}],
            placement__gpusPerNode=1,
        ),
    ),
    ("!self.ephemeral", a_job(checkpoint={"claim": {"size": "1Gi"}, "ephemeral": True})),
    ("!self.ephemeral", a_job(checkpoint={"path": "s3://bucket/run", "ephemeral": True})),
    ("'eval/'", a_job(checkpoint__best={"metric": "eval/held-out/mean_reward"})),
    ("'eval/'", a_job(checkpoint__best={"metric": "eval/held/mean_reward"}, evaluation=[EVALUATION])),
    ("has(self.advantage)", a_job(algorithm__advantage={})),
    ("has(self.loss)", a_job(algorithm__loss={"function": "m:loss", "code": "def loss(**given): ..."})),
    ("self.learningRateFloor", a_job(trainer__learningRateFloor=0.1)),
    (
        "self.runPolicy.finalSave",
        a_job(checkpoint__claim={"size": "1Gi", "onDelete": "Delete"}, runPolicy__finalSave=True),
    ),
]

# A living job for the edits below: it may have a critic and a reference.
LIVING: Object = {"algorithm": {"name": "ppo", "kl": {"coefficient": 0.1}}}
# (a changed field, its new value): each refused while the job lives,
FROZEN: list[tuple[str, Any]] = [
    ("model", {"path": "another/model"}),
    ("model", {"path": "some/model", "lora": {}}),
    ("algorithm", {"name": "ppo", "kl": {"coefficient": 0.2}}),
    ("data", {"jsonl": {"path": "/data/other.jsonl"}}),
    ("checkpoint.path", "/elsewhere"),
    ("checkpoint.claim", {"size": "1Gi"}),
    ("critic.model", {"path": "/other"}),
    ("reference.model", {"path": "/other"}),
    ("rewards", [{**PYTHON, "name": "other"}]),
    ("rewards", [{"name": "exact", "type": "http", "url": "http://reward/"}]),
    ("rewards", [{**PYTHON, "name": "exact"}, {**PYTHON, "name": "other"}]),
]
# refused while it is not suspended,
HELD: list[tuple[str, Any]] = [
    ("image", "rlhf-worker:other"),
    ("imagePullPolicy", "Always"),
    ("rewards", [{**PYTHON, "name": "exact", "weight": 2}]),
    ("rollout", {"engineArgs": {"max_model_len": 512}}),
    ("trainer", {"steps": 11}),
    ("placement", {"mode": "Separated"}),
    ("weightSync", {"verify": False}),
    ("checkpoint", {"everySteps": 1}),
    ("checkpoint", {"keep": 1}),
    ("checkpoint", {"export": False}),
    ("checkpoint", {"best": {"metric": "reward/mean"}}),
    ("evaluation", [EVALUATION]),
    ("telemetry", {"rolloutsEverySteps": 1}),
    ("critic", {"warmupSteps": 1}),
    ("reference", {}),
    ("queue", {"name": "team-a"}),
]
# and taken at any time.
FREE: list[tuple[str, Any]] = [
    ("suspend", True),
    ("runPolicy", {"backoffLimit": 0}),
    ("pods", {"trainer": {"nodeSelector": {"pool": "a"}}}),
    ("networkPolicy", {"enabled": False}),
    ("checkpoint.ephemeral", True),
]


def edited(field: str, value: Any, **changes: Any) -> Object:
    """The living job with this field changed."""
    return a_job(**{**LIVING, **changes, field.replace(".", "__"): value})
