"""Rules that span fields, each once: the CEL that the API server runs, and the same in python for `rlhf_worker local`
and the operator.

A rule's `path` is where in the RLHFJob its CEL hangs (a dotted path of schema properties, `[]` for list items, "" for
the root); `cel` sees that value as `self`. `check` gets the whole job and returns the complaints. tests/api holds one
bad spec a rule, and sends it to both. """

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rlhf_api.algorithms import OWN, UNGROUPED
from rlhf_api.job import (
    AlgorithmSpec,
    CheckpointSpec,
    EnvironmentSpec,
    EvaluationSpec,
    PlacementMode,
    PromptsSpec,
    RewardSpec,
    RLHFJob,
    RowsSpec,
    SamplingSpec,
    SourceSpec,
)
from rlhf_api.placement import own_gpus

NAME_PATTERN = "^[a-z]([-a-z0-9]*[a-z0-9])?$"
NAME_MAX = 40
# What may change while the job lives: these always, all others while it is suspended, for they need another
# RayCluster...
MUTABLE = ("runPolicy", "suspend", "pods", "networkPolicy", "checkpoint.ephemeral")
# ...but for these, of which the run and its checkpoints are made.
NEVER = ("model", "algorithm", "data", "checkpoint.path", "checkpoint.claim", "critic.model", "reference.model")
MOST_GPUS = 8192
RESOURCE_PATTERN = (
    "^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*/[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
)
# Of checkpoint.path: a URL of another filesystem; a directory; a directory that none can be mounted at.
URL_PATTERN, DIRECTORY_PATTERN = "^[a-z][a-z0-9+.-]*://", "^(file://)?/[^:]*$"
NO_DIRECTORY_PATTERN = "^(file://)?[/.]*$|/[.][.](/|$)"
IN_REWARD = tuple(name for name, own in OWN.items() if own.get("kl", {}).get("place") == "reward")
SOURCES = ("jsonl", "parquet", "dataset", "reasoning_gym")

Check = Callable[[RLHFJob], Iterator[str]]


@dataclass(frozen=True, slots=True)
class Rule:
    path: str
    cel: str
    message: str
    field: str
    check: Check | None = None  # None: a transition rule, which only the API server can judge


def _gpus(job: RLHFJob) -> Iterator[str]:
    rollout, trainer = job.spec.rollout, job.spec.trainer
    engine_gpus = rollout.engines * rollout.tensor_parallel_size
    if job.spec.placement.mode is PlacementMode.COLOCATED and rollout.engine == "vllm" and engine_gpus != trainer.gpus:
        yield f"rollout.engines x rollout.tensorParallelSize is {engine_gpus}, trainer.gpus is {trainer.gpus}"


def _staleness(job: RLHFJob) -> Iterator[str]:
    if job.spec.rollout.staleness and job.spec.placement.mode is PlacementMode.COLOCATED:
        yield f"staleness is {job.spec.rollout.staleness}, mode is Colocated"


def _carried(job: RLHFJob) -> Iterator[str]:
    rollout = job.spec.rollout
    if rollout.over_sampling > 1 and (rollout.staleness or rollout.engine == "hf" or rollout.environment):
        environment = "an environment is" if rollout.environment else "no environment is"
        yield f"staleness is {rollout.staleness}, engine is {rollout.engine}, {environment} set"


def _carried_sampling(job: RLHFJob) -> Iterator[str]:
    sampling = job.spec.rollout.sampling
    if job.spec.rollout.over_sampling > 1 and (
        sampling.stop or sampling.presence_penalty or sampling.frequency_penalty
    ):
        yield (f"stop has {len(sampling.stop)} texts, presencePenalty is {sampling.presence_penalty:g}, "
            f"frequencyPenalty is {sampling.frequency_penalty:g}")


def _carried_rewards(job: RLHFJob) -> Iterator[str]:
    if job.spec.rollout.over_sampling > 1:
        shared = [reward.name for reward in job.spec.rewards if reward.type == "model" and reward.gpus is None]
        yield from (f"rewards[{name}] has none" for name in shared)


def _hf(job: RLHFJob) -> Iterator[str]:
    rollout, mode = job.spec.rollout, job.spec.placement.mode
    if rollout.engine == "hf" and (
        mode is PlacementMode.SEPARATED or rollout.engines * rollout.tensor_parallel_size != 1
    ):
        yield f"mode is {mode}, engines is {rollout.engines}, tensorParallelSize is {rollout.tensor_parallel_size}"


def _class_of(spec: EnvironmentSpec | None) -> str:
    if spec is None or (spec.function is None) != (spec.code is None):
        return ""
    return "neither is set" if spec.code is None else "both are set"


def _environment(job: RLHFJob) -> Iterator[str]:
    if text := _class_of(job.spec.rollout.environment):
        yield text


def _unbounded(job: RLHFJob) -> Iterator[str]:
    sampling = job.spec.rollout.sampling
    if not sampling.top_k and (sampling.top_p < 1 or sampling.min_p > 0 or sampling.min_tokens > 0):
        yield f"topP is {sampling.top_p:g}, minP is {sampling.min_p:g}, minTokens is {sampling.min_tokens}, topK is 0"


def _penalties(job: RLHFJob) -> Iterator[str]:
    if job.spec.rollout.sampling.penalises and job.spec.algorithm.correction.token_cap == 0:
        yield "tokenCap is 0"


def _too_short(sampling: SamplingSpec, most: int) -> str:
    return f"minTokens is {sampling.min_tokens}, maxTokens is {most}" if sampling.min_tokens > most else ""


def _turn_length(job: RLHFJob) -> Iterator[str]:
    if text := _too_short(job.spec.rollout.sampling, job.spec.rollout.max_tokens):
        yield text


def _evaluation_length(job: RLHFJob) -> Iterator[str]:
    for evaluation in job.spec.evaluation:
        if text := _too_short(evaluation.sampling, evaluation.max_tokens or job.spec.rollout.max_tokens):
            yield f"evaluation[{evaluation.name}]: {text}"


def _fractions(job: RLHFJob) -> Iterator[str]:
    shares, rollout = job.spec.placement.fractions, job.spec.rollout
    awake = job.spec.placement.mode is PlacementMode.COLOCATED and rollout.engine == "vllm" and rollout.sleep is False
    if awake and shares.trainer + shares.rollout > 1:
        yield f"{shares.trainer} + {shares.rollout} > 1"


def _sleep(job: RLHFJob) -> Iterator[str]:
    rollout, mode = job.spec.rollout, job.spec.placement.mode
    if rollout.sleep and (mode is PlacementMode.SEPARATED or rollout.engine == "hf"):
        yield f"mode is {mode}, engine is {rollout.engine}"


def _tensor_parallel(job: RLHFJob) -> Iterator[str]:
    if job.spec.rollout.tensor_parallel_size > job.spec.placement.gpus_per_node:
        yield f"{job.spec.rollout.tensor_parallel_size} > {job.spec.placement.gpus_per_node}"


def _whole_nodes(job: RLHFJob) -> Iterator[str]:
    own, node = own_gpus(job.spec), job.spec.placement.gpus_per_node
    gpus = job.spec.trainer.gpus + sum(own.values())
    if gpus > node and gpus % node:
        each = ", ".join(f"{name} {count}" for name, count in {"trainer": job.spec.trainer.gpus, **own}.items())
        yield f"they are {gpus} GPUs ({each}), placement.gpusPerNode is {node}"


def _hybrid(job: RLHFJob) -> Iterator[str]:
    groups, node = {"trainer": job.spec.trainer.gpus, **own_gpus(job.spec)}, job.spec.placement.gpus_per_node
    odd = [f"{name} {gpus}" for name, gpus in groups.items() if gpus % node]
    if job.spec.trainer.sharding == "Hybrid" and sum(groups.values()) > node and odd:
        yield f"gpus: {', '.join(odd)}, placement.gpusPerNode is {node}"


def _critic(job: RLHFJob) -> Iterator[str]:
    if job.spec.critic is not None and job.spec.algorithm.name != "ppo":
        yield f"algorithm.name is {job.spec.algorithm.name}"


def _reference(job: RLHFJob) -> Iterator[str]:
    if job.spec.reference is not None and not job.spec.algorithm.kl.coefficient:
        yield "the coefficient is 0"


def _whole_engines(job: RLHFJob) -> Iterator[str]:
    size, node = job.spec.rollout.tensor_parallel_size, job.spec.placement.gpus_per_node
    engines, per_node = job.spec.rollout.engines, node // size
    rest = node % size if job.spec.placement.mode is PlacementMode.COLOCATED else engines % max(per_node, 1)
    if 0 < per_node < engines and rest:
        yield f"{engines} engines of {size} GPUs, {node} GPUs a node"


def _together(job: RLHFJob) -> Iterator[str]:
    trainer = job.spec.trainer
    groups = {"trainer": trainer.gpus, **own_gpus(job.spec)}
    if odd := [f"{name} {gpus}" for name, gpus in groups.items() if gpus % trainer.context_parallel]:
        yield f"contextParallel is {trainer.context_parallel}, gpus: {', '.join(odd)}"


def _padded(job: RLHFJob) -> Iterator[str]:
    if job.spec.trainer.context_parallel > 1 and job.spec.trainer.batching == "padded":
        yield f"contextParallel is {job.spec.trainer.context_parallel}, batching is padded"


def _batch(job: RLHFJob) -> Iterator[str]:
    samples = job.spec.rollout.prompts_per_step * job.spec.rollout.samples_per_prompt
    parts = job.spec.trainer.gpus // job.spec.trainer.context_parallel * job.spec.trainer.updates_per_step
    if samples < parts:
        yield f"{samples} samples for {parts} parts"


def _one_source(data: RowsSpec) -> str:
    named = [name for name in (*SOURCES, "sources") if getattr(data, name, None) is not None]
    return "" if len(named) == 1 else f"{len(named)} are set"


def _train_source(job: RLHFJob) -> Iterator[str]:
    if text := _one_source(job.spec.data):
        yield text


def _each_source(complaint: Callable[[SourceSpec, RLHFJob], str]) -> Check:
    def check(job: RLHFJob) -> Iterator[str]:
        for source in job.spec.data.sources or ():
            if text := complaint(source, job):
                yield f"sources[{source.name}]: {text}"

    return check


def _no_such_reward(source: SourceSpec, job: RLHFJob) -> str:
    missing = sorted(set(source.rewards or ()) - {reward.name for reward in job.spec.rewards})
    return f"there is no {', '.join(missing)}" if missing else ""


def _idle_reward(job: RLHFJob) -> Iterator[str]:
    sources = job.spec.data.sources or ()
    if sources and all(source.rewards for source in sources):
        named = {name for source in sources for name in source.rewards or ()}
        yield from (f"{reward.name} is in none" for reward in job.spec.rewards if reward.name not in named)


def _no_template(data: PromptsSpec) -> str:
    kwargs = data.chat_template_kwargs
    given = {"chatTemplateText": data.chat_template_text, "chatTemplateKwargs": kwargs, "tools": data.tools}
    named = [name for name, value in given.items() if value is not None]
    return f"chatTemplate is false, {' and '.join(named)} set" if named and not data.chat_template else ""


def _untemplated(job: RLHFJob) -> Iterator[str]:
    if text := _no_template(job.spec.data):
        yield text


def _each_reward(complaint: Callable[[RewardSpec], str]) -> Check:
    def check(job: RLHFJob) -> Iterator[str]:
        for reward in job.spec.rewards:
            if text := complaint(reward):
                yield f"rewards[{reward.name}]: {text}"

    return check


def _each_own_reward(complaint: Callable[[RewardSpec], str]) -> Check:
    def first(evaluation: EvaluationSpec) -> str:
        return next((f"rewards[{r.name}]: {text}" for r in evaluation.rewards or () if (text := complaint(r))), "")

    return _each_evaluation(first)


def _python_reward(reward: RewardSpec) -> str:
    if reward.type != "python" or (reward.function is None) != (reward.code is None):
        return ""
    return "both are set" if reward.code is not None else "neither is set"


def _http_reward(reward: RewardSpec) -> str:
    return "url is missing" if reward.type == "http" and reward.url is None else ""


def _model_reward(reward: RewardSpec) -> str:
    if reward.type == "model":
        return "" if reward.model else "model is missing"
    return f"type is {reward.type}" if reward.model or reward.gpus else ""


def _judge_reward(reward: RewardSpec) -> str:
    missing = [
        name
        for name, value in (("url", reward.url), ("judge", reward.judge)) if reward.type == "judge" and value is None
    ]
    return f"{' and '.join(missing)} missing" if missing else ""


def _judge_scale(reward: RewardSpec) -> str:
    judge = reward.judge
    return f"low is {judge.low:g}, high is {judge.high:g}" if judge and judge.low >= judge.high else ""


def _judge_prompt(reward: RewardSpec) -> str:
    return "{completion} is missing" if reward.judge and "{completion}" not in reward.judge.prompt else ""


def _clip_order(reward: RewardSpec) -> str:
    clip = reward.clip
    return f"low is {clip.low:g}, high is {clip.high:g}" if clip and clip.low >= clip.high else ""


def _group_scope(reward: RewardSpec) -> str:
    return f"type is {reward.type}" if reward.scope == "group" and reward.type not in ("python", "http") else ""


def _compared(job: RLHFJob) -> Iterator[str]:
    names = [reward.name for reward in job.spec.rewards if reward.normalize == "group"]
    if names and job.spec.rollout.samples_per_prompt < 2:
        yield f"samplesPerPrompt is {job.spec.rollout.samples_per_prompt}, rewards {', '.join(names)}"


def _own_metric(reward: RewardSpec) -> str:
    return f"{reward.name} is taken" if reward.name in ("mean", "std", "overlong", "environment") else ""


def _unique(names: list[str]) -> Iterator[str]:
    if len(set(names)) != len(names):
        yield f"names are {', '.join(names)}"


def _each_evaluation(complaint: Callable[[EvaluationSpec], str]) -> Check:
    def check(job: RLHFJob) -> Iterator[str]:
        for evaluation in job.spec.evaluation:
            if text := complaint(evaluation):
                yield f"evaluation[{evaluation.name}]: {text}"

    return check


def _names_of_rewards(evaluation: EvaluationSpec) -> str:
    return next(_unique([reward.name for reward in evaluation.rewards or ()]), "")


def _model_of_a_set(reward: RewardSpec) -> str:
    return "type is model" if reward.type == "model" else ""


def _too_many(evaluation: EvaluationSpec) -> str:
    most = max((*evaluation.pass_at, *evaluation.maj_at), default=1)
    return f"k is {most}, samples is {evaluation.samples}" if most > evaluation.samples else ""


def _answer(evaluation: EvaluationSpec) -> str:
    return "majAt is empty" if evaluation.answer_pattern and not evaluation.maj_at else ""


def _same_samples(evaluation: EvaluationSpec) -> str:
    return f"samples is {evaluation.samples}" if evaluation.samples > 1 and evaluation.temperature == 0 else ""


def _min_engines(job: RLHFJob) -> Iterator[str]:
    if job.spec.rollout.min_engines > job.spec.rollout.engines:
        yield f"{job.spec.rollout.min_engines} > {job.spec.rollout.engines}"


def _backend(job: RLHFJob) -> Iterator[str]:
    backend, mode = job.spec.weight_sync.backend, job.spec.placement.mode
    shared, apart = ("ipc", "vllm-ipc"), ("nccl", "vllm-nccl", "sharded_rdt")
    if backend in (shared if mode is PlacementMode.SEPARATED else apart):
        yield f"backend is {backend}, mode is {mode}"


def _adapters(job: RLHFJob) -> Iterator[str]:
    if job.spec.model.lora is not None and job.spec.weight_sync.backend != "auto":
        yield f"backend is {job.spec.weight_sync.backend}"


def _algorithm(broken: Callable[[AlgorithmSpec], bool]) -> Check:
    def check(job: RLHFJob) -> Iterator[str]:
        if broken(job.spec.algorithm):
            yield f"algorithm.name is {job.spec.algorithm.name}"

    return check


def _below_one(spec: AlgorithmSpec) -> bool:
    return any(
        0 < (bound or 0) < 1
        for bound in (spec.correction.token_cap, spec.correction.token_max, spec.correction.sequence_max)
    )


def _kl_in_loss(spec: AlgorithmSpec) -> bool:
    return spec.kl.estimator == "k1" and (spec.kl.place or ("reward" if spec.name in IN_REWARD else "loss")) == "loss"


def _adapts_nothing(spec: AlgorithmSpec) -> bool:
    return bool((spec.kl.target and not spec.kl.coefficient) or (spec.kl.horizon and not spec.kl.target))


def _no_rounds(spec: AlgorithmSpec) -> bool:
    sampling = spec.dynamic_sampling
    return bool(sampling.max_rounds) and not (spec.name == "dapo" if sampling.enabled is None else sampling.enabled)


def _no_buffer(spec: AlgorithmSpec) -> bool:
    return bool(spec.overlong.penalty) and not (
        spec.name == "dapo" if spec.overlong.buffer_tokens is None else spec.overlong.buffer_tokens
    )


def _function(name: str) -> Check:
    def check(job: RLHFJob) -> Iterator[str]:
        given = getattr(job.spec.algorithm, name)
        if given is not None and (given.function is None) == (given.code is None):
            yield "neither is set" if given.code is None else "both are set"

    return check


def _floor(job: RLHFJob) -> Iterator[str]:
    if job.spec.trainer.learning_rate_floor and job.spec.trainer.learning_rate_schedule == "constant":
        yield f"learningRateFloor is {job.spec.trainer.learning_rate_floor:g}"


def _best_set(job: RLHFJob) -> Iterator[str]:
    best, sets = job.spec.checkpoint.best, [evaluation.name for evaluation in job.spec.evaluation]
    if best and best.metric.startswith("eval/") and best.metric.split("/")[1] not in sets:
        yield f"metric is {best.metric}, sets are {', '.join(sets) or 'none'}"


def _group(job: RLHFJob) -> Iterator[str]:
    if job.spec.rollout.samples_per_prompt < 2 and job.spec.algorithm.name not in UNGROUPED:
        yield f"samplesPerPrompt is {job.spec.rollout.samples_per_prompt}, algorithm.name is {job.spec.algorithm.name}"


def _buffer(job: RLHFJob) -> Iterator[str]:
    if (job.spec.algorithm.overlong.buffer_tokens or 0) > job.spec.rollout.max_tokens:
        yield f"{job.spec.algorithm.overlong.buffer_tokens} > {job.spec.rollout.max_tokens}"


def _all_gpus(job: RLHFJob) -> Iterator[str]:
    spec = job.spec
    gpus = spec.trainer.gpus + sum(own_gpus(spec).values())
    if spec.placement.mode is PlacementMode.SEPARATED:
        gpus += spec.rollout.engines * spec.rollout.tensor_parallel_size
    if gpus > MOST_GPUS:
        yield f"they are {gpus}"


def _resource_name(job: RLHFJob) -> Iterator[str]:
    name = job.spec.placement.resource_name
    if not re.search(
        RESOURCE_PATTERN, name,
    ) or name.endswith("\n") or "kubernetes.io/" in name or name.startswith("requests."):
        yield f"it is {name!r}"


def _path(job: RLHFJob) -> Iterator[str]:
    path = job.spec.checkpoint.path
    if re.search(URL_PATTERN, path) and not path.startswith("file:"):
        return
    if not re.fullmatch(DIRECTORY_PATTERN, path, re.DOTALL) or re.search(NO_DIRECTORY_PATTERN, path):
        yield f"it is {path!r}"


def _sources(job: RLHFJob) -> Iterator[str]:
    spec = job.spec
    models = [spec.model, spec.critic and spec.critic.model, spec.reference and spec.reference.model]
    for model in (*models, *(reward.model for reward in spec.rewards)):
        if model and model.source and not model.path.startswith("/"):
            yield f"path is {model.path}, source is {model.source.repo}"


def _claimed_path(job: RLHFJob) -> Iterator[str]:
    if job.spec.checkpoint.claim is not None and job.spec.checkpoint.directory is None:
        yield f"path is {job.spec.checkpoint.path}"


def _shared_claim(job: RLHFJob) -> Iterator[str]:
    claim, node = job.spec.checkpoint.claim, job.spec.placement.gpus_per_node
    gpus = job.spec.trainer.gpus + sum(own_gpus(job.spec).values())
    if claim is not None and claim.access_mode != "ReadWriteMany" and gpus > node:
        yield f"{gpus} GPUs, {node} a pod, accessMode is {claim.access_mode}"


def _lasting(job: RLHFJob) -> Iterator[str]:
    checkpoint = job.spec.checkpoint
    if checkpoint.ephemeral and (checkpoint.claim is not None or checkpoint.directory is None):
        yield "there is a claim" if checkpoint.claim else f"path is {checkpoint.path}"


def _saved_for_nothing(job: RLHFJob) -> Iterator[str]:
    claim = job.spec.checkpoint.claim
    if job.spec.run_policy.final_save and claim is not None and claim.on_delete == "Delete":
        yield "claim.onDelete is Delete"


def _name(job: RLHFJob) -> Iterator[str]:
    if len(job.metadata.name) > NAME_MAX or not re.fullmatch(NAME_PATTERN, job.metadata.name):
        yield f"it is {job.metadata.name!r} with {len(job.metadata.name)} characters"


COLOCATED = "self.placement.mode != 'Colocated' || "
EACH_TRAINER_GPUS = ", ".join(["self.trainer.gpus", *(f"has(self.{role}) && has(self.{role}.gpus) ? self.{role}.gpus "
    ": 0" for role in ("critic", "reference"))])
TRAINER_GPUS = f"[{EACH_TRAINER_GPUS}].sum() + self.rewards.map(r, has(r.gpus) ? r.gpus : 0).sum()"
TEMPLATED = (
    "!has(DATA.chatTemplate) || DATA.chatTemplate"
    " || !(has(DATA.chatTemplateText) || has(DATA.chatTemplateKwargs) || has(DATA.tools))"
)
UNTEMPLATED = (
    "chatTemplateText, chatTemplateKwargs and tools are for a chat template: remove them, or leave chatTemplate true"
)
OF_A_REWARD: tuple[tuple[str, str, Callable[[RewardSpec], str]], ...] = (
    ("!(self.name in ['mean', 'std', 'overlong', 'environment'])",
     "mean, std, overlong and environment are metrics of the worker's own: give the reward another name", _own_metric),
    ("self.type != 'python' || has(self.function) != has(self.code)",
     "a python reward needs exactly one of function and code", _python_reward),
    ("self.type != 'http' || has(self.url)", "an http reward needs url", _http_reward),
    ("self.type == 'model' ? has(self.model) : !has(self.model) && !has(self.gpus)",
     "a model reward needs model, and no other has model or gpus", _model_reward),
    ("self.type != 'judge' || has(self.url) && has(self.judge)", "a judge reward needs url and judge", _judge_reward),
    ("!has(self.judge) || self.judge.low < self.judge.high", "judge.low must be below judge.high", _judge_scale),
    ("!has(self.judge) || self.judge.prompt.contains('{completion}')",
     "judge.prompt must hold {completion}", _judge_prompt),
    ("!has(self.clip) || self.clip.low < self.clip.high", "clip.low must be below clip.high", _clip_order),
    ("self.scope == 'sample' || self.type in ['python', 'http']",
     "only a python or http reward sees a whole group: set scope to sample", _group_scope),
)  # fmt: skip
# A rule on an object whose default is {} is tried on that very {}, before the inner defaults are filled in: hence `has`
# of fields with defaults.
RULES = (
    Rule("", f"self.metadata.name.size() <= {NAME_MAX} && self.metadata.name.matches('{NAME_PATTERN}')",
         f"must start with a letter and have at most {NAME_MAX} characters of a-z, 0-9 and -: names of pods "
             "and Services are made from it", "metadata.name", _name),
    Rule("spec", COLOCATED + "self.rollout.engine == 'hf' || self.rollout.engines * self.rollout.tensorParallelSize "
        "== self.trainer.gpus",
         "Colocated needs rollout.engines x rollout.tensorParallelSize == trainer.gpus: change one of the "
             "three, or set placement.mode to Separated", "trainer.gpus", _gpus),
    Rule("spec", "self.rollout.staleness == 0 || self.placement.mode == 'Separated'",
         "generation and training overlap only on GPUs of their own: set placement.mode to Separated, or "
             "rollout.staleness to 0", "rollout.staleness", _staleness),
    Rule("spec", "[self.rollout].all(r, r.overSampling == 1.0 || r.staleness == 0 && r.engine == 'vllm' && "
        "!has(r.environment))",
         "overSampling carries unfinished completions of vLLM engines over to the next step: with staleness they run "
             "on anyway, hf cannot be interrupted, and an episode of several turns is not carried: leave "
             "rollout.overSampling at 1, or set rollout.staleness to 0, rollout.engine to vllm and remove "
             "rollout.environment", "rollout.overSampling", _carried),
    Rule("spec", "self.rollout.overSampling == 1.0 || [self.rollout.sampling].all(s, "
         "(!has(s.stop) || s.stop.size() == 0) && (!has(s.presencePenalty) || s.presencePenalty == 0.0)"
         " && (!has(s.frequencyPenalty) || s.frequencyPenalty == 0.0))",
         "a completion that goes on in the next step begins there for stop texts and penalties of what it said: use "
             "sampling.stopTokenIds or repetitionPenalty, or leave rollout.overSampling at 1",
         "rollout.sampling", _carried_sampling),
    Rule("spec", "self.rollout.overSampling == 1.0 || self.rewards.all(w, w.type != 'model' || has(w.gpus))",
         "with overSampling completions are scored while others are made: give reward models gpus of their own "
             "(rewards[].gpus), or leave rollout.overSampling at 1", "rollout.overSampling", _carried_rewards),
    Rule("spec", "self.rollout.engine != 'hf' || self.placement.mode == 'Colocated' && self.rollout.engines * "
        "self.rollout.tensorParallelSize == 1",
         "hf generates on the trainer's own GPUs: set placement.mode to Colocated and leave rollout.engines "
             "and rollout.tensorParallelSize at 1", "rollout.engine", _hf),
    Rule("spec.rollout", "!has(self.environment) || has(self.environment.function) != has(self.environment.code)",
         "an environment needs exactly one of function and code", "rollout.environment", _environment),
    Rule("spec.rollout.sampling", "has(self.topK) && self.topK > 0 || (!has(self.topP) || self.topP == 1.0)"
         " && (!has(self.minP) || self.minP == 0.0) && (!has(self.minTokens) || self.minTokens == 0)",
         "topP, minP and minTokens leave out tokens, and the trainer's log probabilities leave out the same ones only"
         " where topK bounds what is left: set topK, or remove them", "rollout.sampling", _unbounded),
    Rule("spec", "!has(self.algorithm.correction.tokenCap) || self.algorithm.correction.tokenCap > 0.0"
         " || [self.rollout.sampling].all(s, (!has(s.repetitionPenalty) || s.repetitionPenalty == 1.0)"
         " && (!has(s.presencePenalty) || s.presencePenalty == 0.0)"
         " && (!has(s.frequencyPenalty) || s.frequencyPenalty == 0.0))",
         "a penalty makes the engine draw from another distribution than the policy, and only importance weights"
         " make up for it: set algorithm.correction.tokenCap to at least 1, or remove the penalties",
         "rollout.sampling", _penalties),
    Rule("spec.rollout", "!has(self.sampling) || !has(self.sampling.minTokens) || !has(self.maxTokens)"
         " || self.sampling.minTokens <= self.maxTokens",
         "a completion has at most maxTokens: lower sampling.minTokens or raise maxTokens",
         "rollout.sampling", _turn_length),
    Rule("spec", COLOCATED + "self.rollout.engine == 'hf' || !has(self.rollout.sleep) || self.rollout.sleep"
         " || self.placement.fractions.trainer + self.placement.fractions.rollout <= 1.0",
         "with rollout.sleep false the fractions of one GPU must sum to at most 1: lower fractions.trainer or"
         " fractions.rollout, or remove rollout.sleep", "placement.fractions", _fractions),
    Rule("spec", "!has(self.rollout.sleep) || !self.rollout.sleep || self.placement.mode == 'Colocated' &&"
         " self.rollout.engine == 'vllm'",
         "only engines that share the trainer's GPUs have memory to give it: remove rollout.sleep, or set"
         " placement.mode to Colocated and rollout.engine to vllm", "rollout.sleep", _sleep),
    Rule("spec", "self.rollout.minEngines <= self.rollout.engines", "there are fewer engines: lower "
        "rollout.minEngines or raise rollout.engines", "rollout.minEngines", _min_engines),
    Rule("spec", "self.rollout.tensorParallelSize <= self.placement.gpusPerNode",
         "an engine must fit on one node: lower rollout.tensorParallelSize or raise placement.gpusPerNode",
         "rollout.tensorParallelSize", _tensor_parallel),
    Rule("spec", f"[{TRAINER_GPUS}].all(gpus, gpus <= self.placement.gpusPerNode || gpus % self.placement.gpusPerNode "
        "== 0)",
         "a trainer of more than one node must fill whole nodes: make trainer.gpus and the gpus of critic, "
             "reference and rewards a multiple of placement.gpusPerNode together",
         "trainer.gpus", _whole_nodes),
    Rule("spec", f"self.trainer.sharding != 'Hybrid' || [{TRAINER_GPUS}].all(gpus, gpus <= "
        f"self.placement.gpusPerNode) || [{EACH_TRAINER_GPUS}].all(gpus, gpus % self.placement.gpusPerNode == 0) && "
        "self.rewards.all(r, !has(r.gpus) || r.gpus % self.placement.gpusPerNode == 0)",
         "Hybrid divides each role over whole nodes: make trainer.gpus and the gpus of critic, reference and rewards "
             "each a multiple of placement.gpusPerNode, or set trainer.sharding to Full", "trainer.sharding", _hybrid),
    Rule("spec", "!has(self.critic) || self.algorithm.name == 'ppo'", "only ppo has a critic: remove it, or set "
        "algorithm.name to ppo", "critic", _critic),
    Rule("spec", "!has(self.reference) || self.algorithm.kl.coefficient > 0.0",
         "there is no reference without a KL term: remove it, or set algorithm.kl.coefficient", "reference",
         _reference),
    Rule("spec", "self.rollout.tensorParallelSize > self.placement.gpusPerNode"
         " || self.rollout.engines <= self.placement.gpusPerNode / self.rollout.tensorParallelSize"
         " || (self.placement.mode == 'Colocated' ? self.placement.gpusPerNode % self.rollout.tensorParallelSize == 0"
         " : self.rollout.engines % (self.placement.gpusPerNode / self.rollout.tensorParallelSize) == 0)",
         "engines on more than one node must fill whole nodes: change rollout.engines, "
             "rollout.tensorParallelSize or placement.gpusPerNode", "rollout.engines", _whole_engines),
    Rule("spec", f"[{EACH_TRAINER_GPUS}].all(gpus, gpus % self.trainer.contextParallel == 0) && self.rewards.all(r, "
        "!has(r.gpus) || r.gpus % self.trainer.contextParallel == 0)",
         "every group of ranks is divided into as many as share a sequence: make the gpus of trainer, "
             "critic, reference and rewards multiples of trainer.contextParallel",
         "trainer.contextParallel", _together),
    Rule("spec", "self.trainer.contextParallel == 1 || self.trainer.batching == 'packed'",
         "ranks share packed sequences only: set trainer.batching to packed, or trainer.contextParallel to 1",
         "trainer.batching", _padded),
    Rule("spec", "self.rollout.promptsPerStep * self.rollout.samplesPerPrompt >= self.trainer.gpus / "
        "self.trainer.contextParallel * self.trainer.updatesPerStep",
         "a step's batch must hold a sample for each rank and update: raise rollout.promptsPerStep or lower "
             "trainer.updatesPerStep", "rollout.promptsPerStep", _batch),
    Rule("spec", "!(self.weightSync.backend in (self.placement.mode == 'Separated' ? ['ipc', 'vllm-ipc'] : ['nccl', "
        "'vllm-nccl', 'sharded_rdt']))",
         "ipc and vllm-ipc need Colocated (one GPU's memory, shared), nccl, vllm-nccl and sharded_rdt need "
             "Separated (one rank a GPU): use auto", "weightSync.backend", _backend),
    Rule("spec", "!has(self.model.lora) || self.weightSync.backend == 'auto'",
         "with model.lora only the adapters travel, and there is one way: set weightSync.backend to auto, or "
             "remove model.lora", "weightSync.backend", _adapters),
    Rule("spec", f"self.rollout.samplesPerPrompt >= 2 || self.algorithm.name in {list(UNGROUPED)}",
         "the algorithm compares samples of one prompt: set rollout.samplesPerPrompt to 2 or more, or "
             "algorithm.name to ppo or reinforce++", "rollout.samplesPerPrompt", _group),
    Rule("spec", "!has(self.algorithm.overlong.bufferTokens) || self.algorithm.overlong.bufferTokens <= "
        "self.rollout.maxTokens",
         "the buffer is the end of a completion: lower bufferTokens to rollout.maxTokens or less",
         "algorithm.overlong.bufferTokens", _buffer),
    Rule("spec", "!has(self.algorithm.advantageNormalization) || self.algorithm.advantageNormalization != 'group' || "
        f"!(self.algorithm.name in {list(UNGROUPED)})",
         "ppo and reinforce++ have no groups: use batch or none", "algorithm.advantageNormalization",
         _algorithm(lambda a: a.advantage_normalization == "group" and a.name in UNGROUPED)),
    Rule("spec", "!has(self.algorithm.dynamicSampling.enabled) || !self.algorithm.dynamicSampling.enabled || "
        f"!(self.algorithm.name in {list(UNGROUPED)})",
         "ppo and reinforce++ have no groups to drop: remove it", "algorithm.dynamicSampling.enabled",
         _algorithm(lambda a: bool(a.dynamic_sampling.enabled) and a.name in UNGROUPED)),
    Rule("spec", "!has(self.algorithm.dynamicSampling.maxRounds) || (has(self.algorithm.dynamicSampling.enabled) ? "
        "self.algorithm.dynamicSampling.enabled : self.algorithm.name == 'dapo')",
         "there are no rounds without dynamic sampling: remove it, or set enabled",
         "algorithm.dynamicSampling.maxRounds", _algorithm(_no_rounds)),
    Rule("spec", "!(has(self.algorithm.gae.gamma) || has(self.algorithm.gae.lambda) || has(self.algorithm.valueClip)) "
        "|| self.algorithm.name == 'ppo'",
         "only ppo has a critic: remove gae and valueClip, or set algorithm.name to ppo", "algorithm.gae",
         _algorithm(lambda a: a.name != "ppo" and (a.gae.gamma, a.gae.lam, a.value_clip) != (None, None, None))),
    Rule("spec", "!has(self.algorithm.clipLow) || self.algorithm.clipLow < 1.0 || self.algorithm.name == 'cispo'",
         "must be less than 1: only cispo goes without a lower clip", "algorithm.clipLow",
         _algorithm(lambda a: a.clip_low == 1 and a.name != "cispo")),
    Rule("spec", "!has(self.algorithm.dualClip) || self.algorithm.dualClip == 0.0 || self.algorithm.dualClip > 1.0 && "
        "self.algorithm.name != 'cispo'",
         "must be 0 (none) or more than 1, and 0 for cispo, which clips no loss", "algorithm.dualClip",
         _algorithm(lambda a: bool(a.dual_clip) and (a.name == "cispo" or (a.dual_clip or 0) <= 1))),
    Rule("spec", "!has(self.algorithm.overlong.penalty) || (has(self.algorithm.overlong.bufferTokens) ? "
        "self.algorithm.overlong.bufferTokens > 0 : self.algorithm.name == 'dapo')",
         "nothing is punished without a buffer: set overlong.bufferTokens, or remove it", "algorithm.overlong.penalty",
         _algorithm(_no_buffer)),
    Rule("spec.algorithm.correction", "[has(self.tokenCap) ? self.tokenCap : 0.0, has(self.tokenMax) ? self.tokenMax "
        ": 0.0,"
         " has(self.sequenceMax) ? self.sequenceMax : 0.0].all(x, x == 0.0 || x >= 1.0)",
         "tokenCap, tokenMax and sequenceMax must be 0 (off) or at least 1: equal models have weight 1",
         "algorithm.correction", _algorithm(_below_one)),
    Rule("spec", "!has(self.algorithm.kl.estimator) || self.algorithm.kl.estimator != 'k1'"
         " || (has(self.algorithm.kl.place) ? self.algorithm.kl.place == 'reward' : self.algorithm.name in "
             f"{list(IN_REWARD)})",
         "k1 has no gradient in expectation as a loss: use k2 or k3, or set kl.place to reward",
         "algorithm.kl.estimator", _algorithm(_kl_in_loss)),
    Rule("spec.algorithm.kl", "(!has(self.target) || self.target == 0.0 || self.coefficient > 0.0) && "
        "(!has(self.horizon) || has(self.target) && self.target > 0.0)",
         "target needs a coefficient to begin with, and horizon a target: set them, or remove it",
         "algorithm.kl.target", _algorithm(_adapts_nothing)),
    Rule("spec", f"[{TRAINER_GPUS}].all(gpus, gpus + (self.placement.mode == 'Separated' ? self.rollout.engines * "
        f"self.rollout.tensorParallelSize : 0) <= {MOST_GPUS})",
         f"a run has at most {MOST_GPUS} GPUs: lower trainer.gpus, rollout.engines or the gpus of critic, "
             "reference and rewards", "trainer.gpus", _all_gpus),
    Rule("spec.placement", f"!has(self.resourceName) || self.resourceName.matches('{RESOURCE_PATTERN}')"
         " && !self.resourceName.contains('kubernetes.io/') && !self.resourceName.startsWith('requests.')",
         "must be an extended resource of a device plugin, such as nvidia.com/gpu: cpu, memory and what else "
             "Kubernetes counts itself are no GPUs", "placement.resourceName", _resource_name),
    Rule("spec", "(!has(self.model.source) || self.model.path.startsWith('/'))"
         " && (!has(self.critic) || !has(self.critic.model) || !has(self.critic.model.source)"
         " || self.critic.model.path.startsWith('/'))"
         " && (!has(self.reference) || !has(self.reference.model) || !has(self.reference.model.source)"
         " || self.reference.model.path.startsWith('/'))"
         " && self.rewards.all(r, !has(r.model) || !has(r.model.source) || r.model.path.startsWith('/'))",
         "a source is downloaded into the directory path: make path absolute, or remove source",
         "model.path", _sources),
    Rule("spec.checkpoint", f"!has(self.path) || self.path.matches('{URL_PATTERN}') && !self.path.startsWith('file:')"
         f" || self.path.matches('{DIRECTORY_PATTERN}') && !self.path.matches('{NO_DIRECTORY_PATTERN}')",
         "a directory is absolute, not the root, and has no .. and no colon: correct it", "checkpoint.path", _path),
    Rule("spec.checkpoint", "!has(self.claim) || self.path.startsWith('/') || self.path.startsWith('file:')",
         "a claim is mounted, and a URL is no directory: remove claim, or make path a directory", "checkpoint.claim",
         _claimed_path),
    Rule("spec", "!has(self.checkpoint.claim) || self.checkpoint.claim.accessMode == 'ReadWriteMany' || "
        f"[{TRAINER_GPUS}].all(gpus, gpus <= self.placement.gpusPerNode)",
         "several trainer pods save, and each must mount the claim: set accessMode to ReadWriteMany, or "
             "lower trainer.gpus to one pod's", "checkpoint.claim.accessMode", _shared_claim),
    Rule("spec.checkpoint", "!has(self.ephemeral) || !self.ephemeral || !has(self.claim) && "
        "(self.path.startsWith('/') || self.path.startsWith('file:'))",
         "it says that the checkpoints die with the trainer's pod, and here they do not: remove it, or the "
             "claim or URL", "checkpoint.ephemeral", _lasting),
    Rule("spec", "!has(self.checkpoint.best) || !self.checkpoint.best.metric.startsWith('eval/')"
         " || has(self.evaluation) && self.evaluation.exists(e,"
         " self.checkpoint.best.metric.startsWith('eval/' + e.name + '/'))",
         "no such set is evaluated: add it to evaluation, or correct the metric's name", "checkpoint.best", _best_set),
    *(Rule("spec.algorithm", f"!has(self.{name}) || has(self.{name}.function) != has(self.{name}.code)",
           f"{name} needs exactly one of function and code", f"algorithm.{name}", _function(name))
      for name in ("advantage", "loss")),
    Rule("spec.trainer", "self.learningRateFloor == 0.0 || self.learningRateSchedule != 'constant'",
         "a constant rate falls to no floor: remove it, or set learningRateSchedule to linear or cosine",
         "trainer.learningRateFloor", _floor),
    Rule("spec", "!self.runPolicy.finalSave || !has(self.checkpoint.claim) || self.checkpoint.claim.onDelete == 'Keep'",
         "a deletion would wait for a save and then delete it: set checkpoint.claim.onDelete to Keep, or "
             "finalSave to false", "runPolicy.finalSave", _saved_for_nothing),
    Rule("spec.data",
         "[has(self.jsonl), has(self.parquet), has(self.dataset), has(self.reasoningGym), has(self.sources)]"
         ".filter(x, x).size() == 1",
         "set exactly one of jsonl, parquet, dataset, reasoningGym and sources", "data", _train_source),
    Rule("spec.data.sources[]",
         "[has(self.jsonl), has(self.parquet), has(self.dataset), has(self.reasoningGym)].filter(s, s).size() == 1",
         "set exactly one of jsonl, parquet, dataset and reasoningGym in each source", "data.sources",
         _each_source(lambda source, _: _one_source(source))),
    Rule("spec.data.sources", "self.all(s, self.exists_one(twin, twin.name == s.name))", "names must be unique",
         "data.sources", lambda job: _unique([s.name for s in job.spec.data.sources or ()])),
    Rule("spec",
         "!has(self.data.sources)"
         " || self.data.sources.all(s, !has(s.rewards) || s.rewards.all(n, self.rewards.exists(r, r.name == n)))",
         "a source names rewards of spec.rewards: correct the name, or add the reward", "data.sources",
         _each_source(_no_such_reward)),
    Rule("spec",
         "!has(self.data.sources)"
         " || self.rewards.all(r, self.data.sources.exists(s, !has(s.rewards) || r.name in s.rewards))",
         "every reward judges a source: name it in data.sources[].rewards, or remove it", "rewards", _idle_reward),
    Rule("spec.data", TEMPLATED.replace("DATA", "self"), UNTEMPLATED, "data.chatTemplate", _untemplated),
    Rule(
        "spec.rewards", "self.all(r, self.exists_one(other, other.name == r.name))", "names must be unique", "rewards",
        lambda job: _unique([r.name for r in job.spec.rewards])
    ),
    *(Rule("spec.rewards[]", cel, message, "rewards", _each_reward(check)) for cel, message, check in OF_A_REWARD),
    Rule("spec", "self.rollout.samplesPerPrompt > 1 || self.rewards.all(r, r.normalize != 'group')",
         "a reward is normalised within a group of at least two: raise rollout.samplesPerPrompt, or normalize by batch",
         "rewards", _compared),
    Rule(
        "spec.evaluation", "self.all(e, self.exists_one(one, one.name == e.name))", "names must be unique",
        "evaluation", lambda job: _unique([e.name for e in job.spec.evaluation])
    ),
    Rule("spec.evaluation[]", "[has(self.data.jsonl), has(self.data.parquet), has(self.data.dataset), "
        "has(self.data.reasoningGym)].filter(x, x).size() == 1",
         "set exactly one of data.jsonl, data.parquet, data.dataset and data.reasoningGym", "evaluation",
         _each_evaluation(lambda e: _one_source(e.data))),
    Rule("spec.evaluation[]", TEMPLATED.replace("DATA", "self.data"), UNTEMPLATED, "evaluation",
         _each_evaluation(lambda e: _no_template(e.data))),
    Rule("spec", "!has(self.evaluation) || self.evaluation.all(e, !has(e.sampling.minTokens)"
         " || e.sampling.minTokens <= (has(e.maxTokens) ? e.maxTokens : self.rollout.maxTokens))",
         "a completion has at most maxTokens: lower sampling.minTokens or raise maxTokens",
         "evaluation", _evaluation_length),
    Rule("spec.evaluation", "self.all(e, !has(e.environment)"
         " || has(e.environment.function) != has(e.environment.code))",
         "an environment needs exactly one of function and code", "evaluation",
         _each_evaluation(lambda e: _class_of(e.environment))),
    Rule("spec.evaluation[]", "self.passAt.all(k, k <= self.samples) && self.majAt.all(k, k <= self.samples)",
         "k completions are drawn from samples: lower k in passAt and majAt, or raise samples", "evaluation",
         _each_evaluation(_too_many)),
    Rule("spec.evaluation[]", "!has(self.answerPattern) || self.majAt.size() > 0",
         "only majAt reads answers: set it, or remove answerPattern", "evaluation", _each_evaluation(_answer)),
    Rule("spec.evaluation[]", "!has(self.rewards)"
         " || self.rewards.all(r, self.rewards.exists_one(same, same.name == r.name))",
         "names of rewards must be unique", "evaluation", _each_evaluation(_names_of_rewards)),
    Rule("spec.evaluation[]", "!has(self.rewards) || self.rewards.all(r, r.type != 'model')",
         "a reward model sits on GPUs of the run: name it in spec.rewards, or use another type", "evaluation",
         _each_own_reward(_model_of_a_set)),
    *(Rule("spec.evaluation[]", f"!has(self.rewards) || self.rewards.all(r, {cel.replace('self.', 'r.')})",
           message, "evaluation", _each_own_reward(check)) for cel, message, check in OF_A_REWARD),
    Rule("spec.evaluation[]", "self.samples == 1 || self.temperature > 0.0",
         "several samples at temperature 0 are all the same: set temperature, or samples to 1", "evaluation",
         _each_evaluation(_same_samples)),
)


def transitions(fields: list[str]) -> list[Rule]:
    """The rules of what may change, for the fields of the spec."""
    alone = [field for field in fields if field not in (*MUTABLE, *NEVER, "checkpoint")]
    kept = Rule("spec", "self.rewards.size() == oldSelf.rewards.size() && self.rewards.all(r, "
        "oldSelf.rewards.exists(o, o.name == r.name && o.type == r.type))",
                "rewards keep their names and types while the job lives, for metrics go by them: change "
                    "their other fields while it is suspended,"
                " or delete the RLHFJob and create it anew", "rewards")
    return [
        *(_never(path) for path in NEVER), kept, *(_suspended(field, [field]) for field in alone),
        _suspended("checkpoint", _checkpoint_fields())
    ]


def _checkpoint_fields() -> list[str]:
    paths = [f"checkpoint.{field.alias}" for field in CheckpointSpec.model_fields.values()]
    return [path for path in paths if path not in (*MUTABLE, *NEVER)]


def _never(path: str) -> Rule:
    return Rule("spec", _same(path), f"{path} can never change, for the run and its checkpoints are made of it: "
        "delete the RLHFJob and create it anew", path)


def _suspended(field: str, paths: list[str]) -> Rule:
    message = f"{field} can change only while the job is suspended: set suspend to true first, in an edit of its own"
    return Rule("spec", f"oldSelf.suspend || {' && '.join(map(_same, paths))}", message, field)


def _same(path: str) -> str:
    """Absent fields may neither appear nor vanish."""
    return (f"({_has('self', path)}) == ({_has('oldSelf', path)}) && (!({_has('self', path)}) || self.{path} == "
        f"oldSelf.{path})")


def _has(root: str, path: str) -> str:
    parts = path.split(".")
    return " && ".join(f"has({root}.{'.'.join(parts[:end])})" for end in range(1, len(parts) + 1))


def violations(job: RLHFJob) -> list[str]:
    """Every rule that the job breaks, as `spec.field: what to do (what is there)`; empty when none."""
    found = [(rule, text) for rule in RULES if rule.check for text in rule.check(job)]
    told = [
        f"{'' if rule.field.startswith('metadata') else 'spec.'}{rule.field}: {rule.message} ({text})"
        for rule, text in found
    ]
    return [*told, *_patterns(job)]


def _patterns(job: RLHFJob) -> Iterator[str]:
    """Python's regular expressions are not CEL's: the API server cannot judge them."""
    rewards = [(f"rewards[{index}]", reward) for index, reward in enumerate(job.spec.rewards)]
    for e in job.spec.evaluation:
        rewards += [(f"evaluation[{e.name}].rewards[{index}]", reward) for index, reward in enumerate(e.rewards or ())]
    patterns = {f"{field}.judge.pattern": reward.judge.pattern for field, reward in rewards if reward.judge}
    answers = {f"evaluation[{e.name}].answerPattern": e.answer_pattern for e in job.spec.evaluation}
    patterns |= {field: pattern for field, pattern in answers.items() if pattern}
    for field, pattern in patterns.items():
        if text := _pattern(pattern):
            yield f"spec.{field}: {text}"


def _pattern(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except (re.error, OverflowError, RecursionError) as error:
        return f"no regular expression: {error}"
    if groups == 1:
        return ""
    return f"needs exactly one group (...), what it reads: it has {groups}; write (?:...) for others"
