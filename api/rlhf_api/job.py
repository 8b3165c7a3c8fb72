"""RLHFJobSpec: what a user may ask for. The one source of the CRD's schema, defaults and reference page.

Every field carries its description here; `crd.py` prints the schema, `rules.py` holds the checks that span fields.
"""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic.alias_generators import to_camel

from rlhf_api import kubernetes
from rlhf_api.base import Model

# Every number has a maximum: what is planned from a spec takes memory of the operator, which all jobs share.
Gpus = Annotated[int, Field(ge=1, le=4096)]
TensorParallel = Annotated[int, Field(ge=1, le=64)]
PositiveInt = Annotated[int, Field(ge=1, le=1_000_000_000)]
Count = Annotated[int, Field(ge=0, le=1_000_000_000)]
Seed = Annotated[int, Field(ge=0, le=2**53 - 1)]  # the largest that every JSON reader keeps
Seconds = Annotated[int, Field(ge=1, le=315_360_000)]
STALL_TIMEOUT_SECONDS = 3600
TOKENS_PER_MICRO_BATCH = 8192  # of trainer.tokensPerMicroBatch, where nothing is known of the memory
Deadline = Annotated[float, Field(gt=0, le=315_360_000)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e9)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e9)]
Number = Annotated[float, Field(ge=-1e9, le=1e9)]
Path = Annotated[str, Field(min_length=1, max_length=4096)]
# More than nothing, which the API server asks of a claim.
StorageSize = Annotated[
    str,
    Field(
        max_length=64,
        pattern=r"^([0-9]*[1-9][0-9]*(\.[0-9]+)?|0+\.[0-9]*[1-9][0-9]*)(Ki|Mi|Gi|Ti|Pi|Ei|k|M|G|T|P|E)?$",
    )
]
# A name of Kubernetes, as most kinds have it.
SUBDOMAIN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
# A part of a metric's name.
MetricName = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
ModuleName = Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
DEEPEST = 32


def _shallow(free: dict[str, Any]) -> dict[str, Any]:
    """What is nested without end cannot be written out again."""
    level: list[Any] = [free]
    for _ in range(DEEPEST):
        level = [
            child for node in level if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    if any(isinstance(node, dict | list) for node in level):
        raise ValueError(f"is nested too deeply: at most {DEEPEST} levels")
    return free


def _foreign(schema: kubernetes.Schema) -> WithJsonSchema:
    return WithJsonSchema({kubernetes.FOREIGN: True, **kubernetes.outline(schema)})


FreeObject = Annotated[dict[str, Any], AfterValidator(_shallow)]
Resources = Annotated[FreeObject, _foreign(kubernetes.RESOURCES)]


class PlacementMode(StrEnum):
    COLOCATED = "Colocated"
    SEPARATED = "Separated"


class HubSource(Model):
    repo: Annotated[str, Field(max_length=256, pattern=r"^[\w.-]+(/[\w.-]+)?$")] = Field(
        description="Hub id, such as Qwen/Qwen3-8B."
    )
    revision: Annotated[str, Field(min_length=1, max_length=256)] = Field("main", description="Branch, tag or commit.")


class ModelSpec(Model):
    path: Path = Field(description="Hub id, or a directory inside the pods (a mounted volume) with a Hugging Face "
        "checkpoint.")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Type of the engine's weights and of the "
        "trainer's matrix products. The trainer's own weights are float32.")
    trust_remote_code: bool = Field(False, description="Run python code that comes with the checkpoint.")
    source: HubSource | None = Field(
        None, description="Where the checkpoint at path comes from, which is a directory then: what is not there yet is"
        " downloaded once a run, by one pod; the others find it on the volume or copy it from that pod. Unset: path has"
        " it.",
    )  # fmt: skip


class LoRASpec(Model):
    rank: Annotated[int, Field(ge=1, le=512)] = Field(16, description="Rows of A and columns of B; the adapter adds "
        "alpha / rank * B A x to what its layer gives.")
    alpha: PositiveFloat = Field(32.0, description="Scale of the adapters, divided by rank.")
    target_modules: Annotated[
        tuple[ModuleName, ...], Field(min_length=1, max_length=64)
    ] | None = Field(None, description="Last part of the "
        "names of the decoder's linear layers that get adapters, such as q_proj. Unset: all of them.")


class PolicySpec(ModelSpec):
    lora: LoRASpec | None = Field(None, description="Train low-rank adapters (arXiv 2106.09685) and leave the model "
        "as it is. Unset: train every weight.")

    @property
    def base(self) -> ModelSpec:
        """As it was before training."""
        return ModelSpec(
            path=self.path, dtype=self.dtype, trust_remote_code=self.trust_remote_code, source=self.source
        )


class KLSpec(Model):
    coefficient: NonNegativeFloat = Field(0.0, description="Weight of the KL term against the reference model. 0 "
        "loads no reference model.")
    estimator: Literal["k1", "k2", "k3"] | None = Field(None, description="k1 = d, k2 = d^2/2, k3 = exp(-d) - 1 + d, "
        "with d = log pi - log pi_ref.")
    place: Literal["loss", "reward"] | None = Field(None, description="Add the term to the loss, or subtract it from "
        "the rewards: of the tokens (ppo, reinforce++), or summed from the sample's.")
    target: NonNegativeFloat | None = Field(None, description="The coefficient adapts to keep the KL, in nats a "
        "token, here. 0: the coefficient is fixed.")
    horizon: PositiveInt | None = Field(None, description="Samples over which the coefficient adapts.")


class GAESpec(Model):
    gamma: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="Discount of a token.")
    lam: Annotated[float, Field(ge=0, le=1)] | None = Field(None, alias="lambda", description="1: returns less "
        "values. Lower: less variance, more trust in the critic.")


class DynamicSamplingSpec(Model):
    enabled: bool | None = Field(None, description="Drop groups whose rewards are all equal, and draw other prompts "
        "for them.")
    max_rounds: Annotated[int, Field(ge=1, le=1000)] | None = Field(None, description="Most rounds of drawing for one "
        "step.")


class OverlongSpec(Model):
    buffer_tokens: Count | None = Field(None, description="The last tokens before rollout.maxTokens, over which a "
        "completion's reward falls. 0: none.")
    penalty: PositiveFloat | None = Field(None, description="What a completion of rollout.maxTokens loses.")


class CorrectionSpec(Model):
    """Of the difference between the engine that sampled and the trainer that learns; weights are exp(log pi_trainer -
    log pi_engine).
    """

    token_cap: NonNegativeFloat | None = Field(None, description="Each token's loss is multiplied with its weight, at "
        "most this (truncated importance sampling). 0: not.")
    token_min: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="Tokens of a lower weight are "
        "left out.")
    token_max: NonNegativeFloat | None = Field(None, description="Tokens of a higher weight are left out. 0: none.")
    sequence_min: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="Sequences of a lower "
        "geometric mean weight are left out.")
    sequence_max: NonNegativeFloat | None = Field(None, description="Sequences of a higher geometric mean weight are "
        "left out. 0: none.")
    alarm: PositiveFloat | None = Field(None, description="A KL of engine from trainer above this, in nats a token, "
        "is warned of.")


class FunctionSpec(Model):
    """Exactly one of function and code."""

    function: str | None = Field(
        None, max_length=512, description="module:function, importable in the image by driver and trainer."
    )
    code: str | None = Field(
        None, max_length=65536, description="Source text that defines a function named as the field: advantage or loss."
    )


class AlgorithmSpec(Model):
    """Options that are not set are the algorithm's own."""

    name: Literal[
        "ppo", "grpo", "rloo", "reinforce++", "reinforce++-baseline", "dr_grpo", "dapo", "gspo", "cispo"
    ] = Field("grpo", description="The algorithm; "
        "docs/algorithms.md tells them apart.")
    clip_low: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="Lower clip of the policy ratio: 1 "
        "- clipLow. Only cispo's may be 1, which is none.")
    clip_high: Annotated[float, Field(gt=0, lt=10)] | None = Field(None, description="Upper clip of the policy ratio: "
        "1 + clipHigh.")
    dual_clip: NonNegativeFloat | None = Field(None, description="Upper clip of the policy ratio where the advantage "
        "is negative. 0: none.")
    loss_aggregation: Literal["tokens", "sequences", "constant"] | None = Field(None, description="tokens: mean over "
        "all tokens. sequences: mean over sequences of each one's mean. constant: sum of tokens by samples x "
        "rollout.maxTokens.")
    advantage_normalization: Literal["none", "group", "batch"] | None = Field(None, description="Divide by the "
        "deviation of the prompt's group, or bring all tokens of the step to mean 0 and deviation 1.")
    value_clip: NonNegativeFloat | None = Field(None, description="ppo: the critic's values count at most this far "
        "from where they were. 0: no clip.")
    gae: GAESpec = Field(default_factory=GAESpec, description="ppo: generalised advantage estimation.")
    kl: KLSpec = Field(default_factory=KLSpec, description="KL penalty against the model as it was before training.")
    dynamic_sampling: DynamicSamplingSpec = Field(
        default_factory=DynamicSamplingSpec, description="Steps of informative groups only.",
    )
    overlong: OverlongSpec = Field(default_factory=OverlongSpec, description="Soft punishment of long completions.")
    correction: CorrectionSpec = Field(default_factory=CorrectionSpec, description="Correction of the difference "
        "between engine and trainer.")
    entropy_coefficient: NonNegativeFloat = Field(
        0.0,
        description="Weight of the policy's entropy, in nats a token, which is added to what is maximised. 0: none.",
    )
    advantage: FunctionSpec | None = Field(
        None,
        description="Advantages of your own, in place of the algorithm's and of advantageNormalization: "
        "f(*, rewards, groups, mask, columns, parts), of tensors; docs/algorithms.md has the shapes.",
    )
    loss: FunctionSpec | None = Field(
        None,
        description="Each token's policy loss of your own, in place of the algorithm's clipped one: "
        "f(*, logprobs, old_logprobs, advantages, entropy, sequence, columns), of tensors; "
        "docs/algorithms.md has the shapes.",
    )


class JsonlData(Model):
    path: Path = Field(description="File inside the pods, one JSON object a line.")


class ParquetData(Model):
    path: Path = Field(description="File or directory of Parquet files inside the pods.")


class HubData(Model):
    path: Path = Field(description="Hub id, or a directory inside the pods that datasets.load_dataset or "
        "load_from_disk reads.")
    name: str | None = Field(None, max_length=256, description="Configuration of the dataset.")
    split: str = Field("train", max_length=256, description="Split to train on.")


class ReasoningGymData(Model):
    task: Annotated[str, Field(min_length=1, max_length=128)] = Field(description="Name of a reasoning-gym task, such "
        "as basic_arithmetic.")
    size: PositiveInt = Field(1000, description="Number of problems made from the seed.")
    config: FreeObject = Field(default_factory=dict, description="Options of the task, passed to "
        "reasoning_gym.create_dataset.")


class RowsSpec(Model):
    """Where rows lie."""

    jsonl: JsonlData | None = Field(None, description="Prompts from a JSON lines file.")
    parquet: ParquetData | None = Field(None, description="Prompts from Parquet.")
    dataset: HubData | None = Field(None, description="Prompts from a Hugging Face dataset.")
    reasoning_gym: ReasoningGymData | None = Field(None, description="Problems and verifiers of a reasoning-gym task.")


class PromptsSpec(RowsSpec):
    """Rows, and how they become prompts. Exactly one of jsonl, parquet, dataset and reasoningGym."""

    prompt_field: str = Field(
        "prompt", max_length=256,
        description="Column with the prompt: a string, or a list of chat messages. reasoningGym fills it itself.",
    )  # fmt: skip
    system_prompt: str | None = Field(None, max_length=16384, description="System message put before every prompt "
        "(chat template only).")
    chat_template: bool = Field(True, description="Render prompts by the tokenizer's chat template, where it has one.")
    chat_template_text: str | None = Field(
        None, min_length=1, max_length=65536,
        description="A chat template of jinja in the place of the tokenizer's, or the name of one of several.",
    )  # fmt: skip
    chat_template_kwargs: FreeObject | None = Field(
        None, description="Variables for the chat template, such as enable_thinking."
    )
    tools: Annotated[list[FreeObject], Field(min_length=1, max_length=128)] | None = Field(
        None, description="Tools that the chat template tells the model of, each as a JSON schema of a function."
    )
    max_prompt_tokens: PositiveInt = Field(1024, description="Most tokens of a prompt, special tokens included.")
    overlong_prompts: Literal["refuse", "drop"] = Field(
        "refuse", description="What becomes of longer ones. refuse: the run does not begin. drop: they are left out."
    )
    seed: Seed = Field(0, description="Seed of the shuffle of every epoch (and of reasoningGym's problems).")


class SourceSpec(RowsSpec):
    """One of several sources. Exactly one of jsonl, parquet, dataset and reasoningGym."""

    name: MetricName = Field(description="Name in metrics (source/<name>/...) and prompts' uids; unique in the list.")
    weight: PositiveFloat = Field(1.0, description="Share of the prompts, by the sum of all weights.")
    rewards: Annotated[tuple[MetricName, ...], Field(min_length=1, max_length=16)] | None = Field(
        None, description="Names of the rewards that judge it; the others are not called and count 0. Unset: all."
    )
    prompt_field: str | None = Field(None, max_length=256, description="As data.promptField, which is its default.")
    system_prompt: str | None = Field(None, max_length=16384, description="As data.systemPrompt, which is its default.")

    def judged_by(self, reward: str) -> bool:
        return self.rewards is None or reward in self.rewards


class DataSpec(PromptsSpec):
    """Exactly one of jsonl, parquet, dataset, reasoningGym and sources."""

    sources: Annotated[tuple[SourceSpec, ...], Field(min_length=1, max_length=16)] | None = Field(
        None, description="Several sources of rows, with a weight and rewards each. They share what else is in data."
    )
    show_special_tokens: bool = Field(
        False,
        description="Rewards and environments see special tokens in a completion, such as <think> of some models, but "
        "not the one that ended it.",
    )  # fmt: skip

    def of(self, source: SourceSpec) -> PromptsSpec:
        """The prompts of one of `sources`, which leaves the rest to this."""
        shared = {name: getattr(self, name) for name in PromptsSpec.model_fields if name not in RowsSpec.model_fields}
        own = {name: value for name, value in source if name in PromptsSpec.model_fields and value is not None}
        return PromptsSpec(**shared | own)


class JudgeSpec(Model):
    model: Annotated[str, Field(min_length=1, max_length=256)] = Field(description="Name of the model that the server "
        "serves.")
    prompt: Annotated[str, Field(min_length=1, max_length=65536)] = Field(description="What the judge is asked, with "
        "{completion}, {prompt} and {column} of the row in it. Other braces stay as they are.")
    pattern: Annotated[
        str, Field(min_length=1, max_length=1024)
    ] = Field(r"(?i)score[^\w-]{1,5}(-?\d+(?:\.\d+)?)", description="Regular expression "
        "of python whose one group is the score; the last match in the answer counts.")
    low: Number = Field(0.0, description="Lowest score, which is worth 0. A score outside of low to high is asked for "
        "again.")
    high: Number = Field(10.0, description="Highest score, which is worth 1.")
    max_tokens: PositiveInt = Field(512, description="Most tokens of one answer.")
    api_key_env: str | None = Field(
        None, max_length=256, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Variable of the trainer pods' environment (pods.trainer.env) that holds the server's key.",
    )


class ClipSpec(Model):
    low: Number = Field(description="Lowest value; a lower one counts as this.")
    high: Number = Field(description="Highest value; a higher one counts as this.")


class CriticSpec(Model):
    model: ModelSpec | None = Field(None, description="Where the critic's backbone starts; its value head starts at "
        "zero. Unset: spec.model.")
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-5,
        description="Learning rate of the critic's AdamW after the warm-up; schedule and all else are the trainer's.",
    )
    warmup_steps: Count = Field(0, description="First steps in which the critic alone is trained.")
    gpus: Gpus | None = Field(None, description="FSDP ranks with a GPU each of their own, in the trainer's pods. "
        "Unset: the critic shares the trainer's ranks.")


class ReferenceSpec(Model):
    model: ModelSpec | None = Field(None, description="The frozen model of the KL term. Unset: spec.model, as it was "
        "before training. It must have the same tokenizer.")
    gpus: Gpus | None = Field(None, description="FSDP ranks with a GPU each of their own, in the trainer's pods. "
        "Unset: the reference shares the trainer's ranks.")


class RewardSpec(Model):
    name: MetricName = Field(description="Name in metrics; unique in the list.")
    type: Literal["python", "http", "judge", "model"] = Field(description="python: a function in a subprocess. http: "
        "a service. judge: a language model behind an OpenAI-compatible chat URL. model: a "
        "sequence-classification model with one label, on the trainer's GPUs.")
    weight: Number = Field(1.0, description="Factor of this reward in the sum.")
    scope: Literal["sample", "group"] = Field(
        "sample",
        description="What python and http see in one call. sample: a completion (http: up to 64 of any prompts). group:"
        " all completions of a prompt; python is called as f(prompt=..., completions=[...], **row) -> [float, ...].",
    )
    clip: ClipSpec | None = Field(
        None, description="Values outside are brought to the nearer bound, before all else."
    )
    normalize: Literal["none", "group", "batch"] = Field(
        "none",
        description="For training, (value - mean) / (deviation + 1e-6) over the prompt's samples or over the step's,"
        " before it is weighted and summed. Metrics, evaluation and recorded samples keep the value.",
    )
    function: str | None = Field(
        None,
        max_length=512,
        description="python: module:function, importable in the image. Called as f(prompt=..., completion=..., **row)"
        " -> float, or (float, {metric: float}).",
    )
    code: str | None = Field(
        None,
        max_length=65536,
        description="python: source text that defines reward(prompt, completion, **row), or reward(prompt, completions,"
        " **row) where scope is group; what it returns is as function's.",
    )
    url: str | None = Field(
        None,
        max_length=2048,
        pattern=r"^https?://.+",
        description='http: POST {"samples": [{"prompt", "completion", ...row}]} -> {"rewards": [float, ...]}, with'
        ' "metrics": [{...}, ...] beside it if you like. judge: the whole URL of chat completions, such as'
        " http://judge:8000/v1/chat/completions.",
    )
    judge: JudgeSpec | None = Field(None, description="judge: what is asked, and how the answer becomes a number.")
    model: ModelSpec | None = Field(None, description="model: the checkpoint. It scores prompt and completion as "
        "text, by its own tokenizer and chat template.")
    gpus: Gpus | None = Field(None, description="model: FSDP ranks with a GPU each of their own, in the trainer's "
        "pods. Unset: the model shares the trainer's ranks.")
    timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = Field(30.0, description="Deadline of one call: of one "
        "sample for python and judge, of one batch for http.")
    workers: Annotated[int, Field(ge=1, le=256)] = Field(2, description="python: subprocesses. http and judge: "
        "concurrent requests.")
    retries: Annotated[int, Field(ge=0, le=20)] = Field(
        2, description="Further tries of a failed sample, before onFailure."
    )
    on_failure: Literal["stop", "redraw"] = Field(
        "stop",
        description="stop: a sample that failed all its tries stops the run with the reward's error. redraw: its group"
        " is sampled anew, at most rollout.maxRedraws times a step.",
    )


class EnvironmentSpec(Model):
    function: str | None = Field(None, max_length=512, description="module:Class, importable in the image. One object "
        "an episode: reset(prompt, **row), then step(completion) -> {\"observation\": str, \"done\": bool, "
        "\"reward\": float or None} after each turn.")
    code: str | None = Field(None, max_length=65536, description="Source text that defines such a class, Environment.")
    max_turns: Annotated[int, Field(ge=1, le=256)] = Field(8, description="Most turns of one episode.")
    timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = Field(30.0, description="Deadline of one reset or step. "
        "Past it the subprocess is killed, and the episodes in it begin again.")
    workers: Annotated[int, Field(ge=1, le=256)] = Field(2, description="Subprocesses beside each engine; each holds "
        "many episodes and runs one call at a time.")
    retries: Annotated[int, Field(ge=0, le=20)] = Field(
        2, description="Further tries of an episode whose environment failed, before onFailure."
    )
    on_failure: Literal["stop", "redraw"] = Field(
        "stop",
        description="stop: an episode that failed all its tries stops the run with the environment's error. redraw: its"
        " group is sampled anew, at most rollout.maxRedraws times a step.",
    )
    weight: Number = Field(1.0, description="Factor of an episode's summed rewards, which are added to spec.rewards.")


Stops = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=256)], ...], Field(max_length=16)]
TokenIds = Annotated[tuple[Annotated[int, Field(ge=0, le=10_000_000)], ...], Field(max_length=64)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class SamplingSpec(Model):
    """How tokens are drawn besides the temperature, as vLLM means these options. They work in each turn by itself."""

    top_k: Annotated[int, Field(ge=0, le=256)] = Field(
        0, description="Draw from the likeliest tokens, so many. 0: from all. In training the trainer computes its log"
        " probabilities over the very tokens that the engine drew from, which travel with each sample: 4 bytes for each"
        " of them a token.",
    )  # fmt: skip
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Draw from the likeliest tokens that have this probability together. In training with topK"
        " only, which bounds the set.",
    )  # fmt: skip
    min_p: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Draw from tokens of at least this share of the likeliest one's probability. In training with"
        " topK only.",
    )  # fmt: skip
    min_tokens: Count = Field(
        0, description="Nothing ends a turn before it has so many tokens: until then its end tokens are not drawn. In"
        " training with topK only.",
    )  # fmt: skip
    stop: Stops = Field(
        (), description="Texts that end a turn. They are left out of its text, and no special token is in them; their"
        " tokens are trained.",
    )  # fmt: skip
    stop_token_ids: TokenIds = Field(
        (), description="Tokens that end a turn besides the model's own. Left out of its text; trained as the model's"
        " own are.",
    )  # fmt: skip
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = Field(
        1.0, description="Divides a positive logit, and multiplies a negative one, of each token that stands in the"
        " prompt or the turn. The trainer does not follow a penalty: see docs/rollouts.md.",
    )  # fmt: skip
    presence_penalty: Penalty = Field(0.0, description="Taken from the logit of each token that the turn has.")
    frequency_penalty: Penalty = Field(0.0, description="Taken from a token's logit as often as the turn has it.")

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class RolloutSpec(Model):
    engine: Literal["vllm", "hf"] = Field("vllm", description="vllm: engines of their own. hf: the trainer's ranks "
        "generate by transformers' generate, slowly and without a weight sync: for debugging.")
    engines: Gpus = Field(1, description="Number of vLLM engines.")
    min_engines: Gpus = Field(1, description="Engines that must serve. While fewer do, the run waits for those that "
        "are started again; more than these may fail meanwhile.")
    tensor_parallel_size: TensorParallel = Field(1, description="GPUs of one engine.")
    sleep: bool | None = Field(None, description="Colocated: whether engines give their GPU's memory to the trainer "
        "from a step's last completion to its weight sync. Default: true on GPUs, false on CPUs, where engines cannot.")
    prompts_per_step: PositiveInt = Field(64, description="Prompts drawn for one step.")
    samples_per_prompt: PositiveInt = Field(8, description="Completions of one prompt: the group that most algorithms "
        "compare within.")
    max_tokens: PositiveInt = Field(512, description="Most tokens of one completion, over all of its turns and "
        "observations.")
    temperature: Annotated[float, Field(ge=0.01, le=2)] = Field(
        1.0, description="Sampling temperature; the trainer's log probabilities use the same."
    )
    sampling: SamplingSpec = Field(
        default_factory=SamplingSpec, description="How tokens are drawn besides the temperature."
    )
    seed: Seed | None = Field(None, description="Gives every sample a seed of its own, so that a resumed run draws "
        "the same samples. It costs speed on GPU (vLLM then samples request by request). Unset: each engine has "
        "one stream of random numbers, from trainer.seed.")
    staleness: Annotated[int, Field(ge=0, le=64)] = Field(0, description="Most steps between a sample's first token "
        "and its training. 0: generation and training take turns. More: they overlap, and the weights change "
        "under running requests; Separated only.")
    over_sampling: Annotated[float, Field(ge=1, le=8)] = Field(1.0, description="Prompts begun for a step, in times of "
        "promptsPerStep. The step ends when promptsPerStep of them are finished; what is unfinished goes on in the "
        "next step, under its weights (partial rollouts). vLLM engines, staleness 0, no environment.")
    max_redraws: Annotated[int, Field(ge=1, le=100000)] = Field(
        16,
        description="Most failed groups of a step that onFailure: redraw allows; one more stops the run with its "
            "error.",
    )
    environment: EnvironmentSpec | None = Field(None, description="Multi-turn: a python class that answers the "
        "model's turns. Its observations are part of the completion, count in maxTokens, and have no loss.")
    deadline_seconds: Deadline = Field(1800.0, description="Deadline of one prompt's completions, from when an engine "
        "gets them; it gets more than it computes at once.")
    engine_args: FreeObject = Field(default_factory=dict, description="Further vLLM engine arguments by their python "
        "names, such as max_model_len.")


class TrainerSpec(Model):
    gpus: Gpus = Field(1, description="FSDP ranks, one GPU (or fraction of one) each.")
    steps: PositiveInt = Field(description="Training steps; one step is one batch of promptsPerStep x "
        "samplesPerPrompt.")
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = Field(1e-6, description="Learning rate of AdamW after the "
        "warm-up.")
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="How the learning rate falls from the end of the warm-up to the last update of the run."
    )
    learning_rate_floor: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="linear, cosine: where the schedule ends, as a share of the learning rate."
    )
    warmup_steps: Count = Field(0, description="Optimizer updates of linear warm-up, of policy and critic alike.")
    weight_decay: NonNegativeFloat = Field(0.0, description="Decoupled weight decay; none for norms and biases.")
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9, description="AdamW's decay of the gradient's mean, an update."
    )
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.95, description="AdamW's decay of the squared gradient's mean, an update."
    )
    adam_epsilon: Annotated[float, Field(gt=0, le=1)] = Field(
        1e-8, description="What AdamW adds to the root of that mean, by which it divides."
    )
    max_grad_norm: PositiveFloat = Field(1.0, description="Gradient norm is clipped to this.")
    epochs: Annotated[int, Field(ge=1, le=1000)] = Field(
        1, description="Passes over each step's batch, against the log probabilities from before the first."
    )
    updates_per_step: PositiveInt = Field(
        1,
        description="Optimizer updates an epoch: the step's samples are shuffled and split into as many mini-batches.",
    )
    context_parallel: Gpus = Field(1, description="FSDP ranks that share each sequence, for sequences whose "
        "activations one GPU cannot hold; a divisor of gpus and of the model's attention heads.")
    sharding: Literal["Full", "Hybrid"] = Field(
        "Full",
        description="Full: a role's weights, gradients and optimizer state are divided over all of its ranks. Hybrid: "
            "over the ranks of a node, and each node holds a copy; gradients cross nodes once an update, weights "
            "never.",
    )
    tokens_per_micro_batch: PositiveInt | None = Field(None, description="Token budget of one packed micro-batch on "
        "one rank; one sequence may take more. Default: what fits into the GPU's memory beside the models; 8192 on CPUs"
        " and for padded batches.")
    gradient_checkpointing: bool = Field(
        True, description="Recompute activations in the backward pass, but for long attention where it fits."
    )
    batching: Literal["packed", "padded"] = Field(
        "packed",
        description="packed: sequences end to end, without padding; a model that the start finds wrong on such "
            "batches is "
        "padded. padded: one a row, by the model's own attention; slower.",
    )
    compile: bool | None = Field(None, description="torch.compile of decoder layers and of the head's sums: a slower "
        "first step, faster later ones. Default: true on GPUs, false on CPUs.")
    offload: bool = Field(False, description="Parameters and optimizer state of a role lie in the host's memory, "
        "pinned, while the role is not used.")
    seed: Seed = Field(0, description="Seed of the job.")


class Fractions(Model):
    trainer: Annotated[float, Field(gt=0, le=1)] = Field(0.9, description="Share of a GPU's memory that a trainer rank "
        "may fill while it trains: the bound of trainer.tokensPerMicroBatch's default.")
    rollout: Annotated[float, Field(gt=0, le=1)] = Field(0.78, description="Share of a GPU's memory that an engine "
        "rank has while it generates: weights, activations and KV cache.")


class PlacementSpec(Model):
    mode: PlacementMode = Field(PlacementMode.COLOCATED, description="Colocated: trainer and engines share every GPU. "
        "Separated: each has its own.")
    gpus_per_node: Gpus = Field(8, description="GPUs of one node: the most that one pod asks for.")
    fractions: Fractions = Field(default_factory=Fractions, description="Shares of a GPU's memory when Colocated. "
        "Engines that sleep and the trainer take turns; without rollout.sleep the two must sum to at most 1.")
    resource_name: str = Field("nvidia.com/gpu", min_length=1, max_length=253, description="Extended resource that "
        "stands for one GPU.")


class WeightSyncSpec(Model):
    backend: Literal["auto", "nccl", "ipc", "shm", "gloo", "vllm-nccl", "vllm-ipc", "sharded_rdt"] = Field(
        "auto",
        description="auto: with model.lora adapter; else on GPU ipc when Colocated and nccl when Separated; on CPU "
            "shm. ipc and shm reach other nodes by nccl and gloo. vllm-nccl, vllm-ipc and sharded_rdt are vLLM's own.",
    )
    verify: bool = Field(True, description="Prove after the first sync, and every verifyEverySteps, that the engines "
        "hold the trainer's weights.")
    verify_every_steps: PositiveInt = Field(50, description="Steps between two proofs.")
    deadline_seconds: Deadline = Field(300.0, description="Deadline of one sync. Past it the sync is tried again "
        "without the engines that died; if none did, the run stops and resumes from its checkpoint.")


class ClaimSpec(Model):
    """A PersistentVolumeClaim that the operator makes, named <job>-checkpoints, mounted at checkpoint.path in the
    trainer's pods.
    """

    size: StorageSize = Field(description="Storage that is asked for, such as 200Gi: room for checkpoint.keep + 1 "
        "checkpoints and the export.")
    storage_class_name: Annotated[
        str, Field(min_length=1, max_length=253, pattern=SUBDOMAIN)
    ] | None = Field(None, description="StorageClass. "
        "Unset: the cluster's default.")
    access_mode: Literal[
        "ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"
    ] = Field("ReadWriteOnce", description="ReadWriteMany where "
        "several trainer pods save.")
    on_delete: Literal["Keep", "Delete"] = Field("Keep", description="What becomes of the claim when the RLHFJob is "
        "deleted. A kept one is taken up by a later job of the same name, which resumes.")


class BestSpec(Model):
    metric: Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9_.@/-]+$")] = Field(
        description="Name of a logged metric, such as eval/<name>/mean_reward or reward/mean."
    )
    mode: Literal["max", "min"] = Field("max", description="Whether the highest or the lowest value is the best.")


class CheckpointSpec(Model):
    path: Annotated[
        str, Field(min_length=2, max_length=4096, pattern=r"^(/|[a-z][a-z0-9+.-]*://).+")
    ] = Field("/checkpoints", description="Directory inside "
        "the trainer pods, on a volume (pods.trainer.volumes) if it is to outlive the cluster; or a URL that "
        "fsspec knows, such as s3://bucket/run, with its driver in spec.image and its credentials in "
        "pods.trainer.env.")
    every_steps: PositiveInt = Field(20, description="Steps between two checkpoints; the last step is always saved.")
    keep: PositiveInt = Field(3, description="Newest checkpoints kept.")
    export: bool = Field(
        True,
        description="Write the final model as a Hugging Face checkpoint to <path>/export, "
        "and that of the best checkpoint, if there is one, to <path>/export-best.",
    )
    best: BestSpec | None = Field(
        None,
        description="Keep the best checkpoint by a metric too, beside the newest. "
        "An evaluation that improves on it makes a checkpoint.",
    )
    claim: ClaimSpec | None = Field(None, description="Make a PersistentVolumeClaim for path. Unset: path is on a "
        "volume of pods.trainer, or a URL, or dies with the trainer's pod.")
    ephemeral: bool = Field(False, description="That the checkpoints die with the trainer's pod is meant: "
        "spec.suspend then ends the run's pods all the same, and a resumed run begins anew.")

    @property
    def directory(self) -> str | None:
        """Where `path` is in the pods' own files; None for a URL of another filesystem."""
        path = self.path.removeprefix("file://")
        return path if path.startswith("/") else None


class EvaluationSpec(Model):
    name: Annotated[
        str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    ] = Field(description="Name in metrics "
        "(eval/<name>/...); unique in the list.")
    data: PromptsSpec = Field(description="The prompts, in the order of the source.")
    every_steps: PositiveInt = Field(50, description="Steps between two evaluations. One more comes before the first "
        "step and one after the last.")
    samples: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="Completions of one prompt.")
    temperature: Annotated[float, Field(ge=0, le=2)] = Field(
        0.0, description="Sampling temperature; 0 takes the likeliest token."
    )
    sampling: SamplingSpec = Field(
        default_factory=SamplingSpec, description="How tokens are drawn besides the temperature; not rollout.sampling."
    )
    rewards: Annotated[tuple[RewardSpec, ...], Field(min_length=1, max_length=8)] | None = Field(
        None, description="The set's own rewards, of any type but model. Unset: spec.rewards."
    )
    environment: EnvironmentSpec | None = Field(
        None, description="The set's own environment. Unset: rollout.environment."
    )
    pass_at: Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], Field(max_length=16)] = Field(
        (), description="Numbers k, at most samples: eval/<name>/pass_at_<k> is the probability that one of k"
        " completions passes (arXiv 2107.03374).",
    )  # fmt: skip
    maj_at: Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(max_length=16)] = Field(
        (), description="Numbers k, at most samples: eval/<name>/maj_at_<k> is the probability that the commonest"
        " answer of k completions passes.",
    )  # fmt: skip
    pass_reward: Number = Field(1.0, description="A completion passes whose weighted sum of rewards is at least this.")
    answer_pattern: Annotated[str, Field(min_length=1, max_length=1024)] | None = Field(
        None, description="Regular expression of python whose one group is the answer that majAt counts; its last match"
        " in the completion. One without a match has no vote. Unset: the whole completion.",
    )  # fmt: skip
    max_tokens: PositiveInt | None = Field(None, description="Most tokens of one completion. Default: "
        "rollout.maxTokens.")
    limit: PositiveInt | None = Field(None, description="Use the first rows only. Default: all.")


class WandbSpec(Model):
    project: Annotated[str, Field(min_length=1, max_length=128)] = Field(description="Project of the run.")
    entity: str | None = Field(None, max_length=128, description="User or team. Default: the key's own.")
    name: str | None = Field(None, max_length=128, description="Name of the run. Default: the job's.")
    mode: Literal["online", "offline"] = Field("online", description="online needs WANDB_API_KEY in pods.trainer.env. "
        "offline: files under <checkpoint.path>/wandb for wandb sync.")


class MlflowSpec(Model):
    tracking_uri: Annotated[str, Field(min_length=1, max_length=2048)] = Field(description="Server, such as "
        "http://mlflow:5000, or a database or directory inside the trainer pods.")
    experiment: Annotated[str, Field(min_length=1, max_length=256)] = Field("rlhfjob", description="Experiment; it is "
        "made if there is none.")


class TelemetrySpec(Model):
    tensorboard: bool = Field(True, description="Scalars under <checkpoint.path>/tensorboard.")
    wandb: WandbSpec | None = Field(None, description="Log to Weights & Biases. The image must have the package wandb.")
    mlflow: MlflowSpec | None = Field(None, description="Log to MLflow. The image must have the package mlflow or "
        "mlflow-skinny.")
    prometheus_port: Annotated[int, Field(ge=1024, le=65535)] | None = Field(None, description="Serve the newest "
        "value of each metric at /metrics on this port of the first trainer pod.")
    rollouts_every_steps: Count = Field(10, description="Steps between two that leave all their samples in "
        "<checkpoint.path>/rollouts/step-N.parquet, for rlhf_worker replay. 0: none.")

    def keeps_rollouts(self, step: int) -> bool:
        return self.rollouts_every_steps > 0 and step % self.rollouts_every_steps == 0


class CleanupSpec(Model):
    on_success: Literal["Delete", "Keep"] = Field("Delete", description="What becomes of the RayCluster after success.")
    on_failure: Literal["Delete", "Keep"] = Field("Delete", description="What becomes of the RayCluster after failure.")


class RunPolicySpec(Model):
    backoff_limit: Count = Field(6, description="Driver restarts without a finished step in between before the job "
        "fails.")
    active_deadline_seconds: Seconds | None = Field(None, description="Longest time from the first Running to the "
        "end; suspended time is not counted.")
    provisioning_deadline_seconds: Seconds = Field(3600, description="Longest time from the creation of the "
        "RayCluster to all of its pods ready; queued time is not counted.")
    reprovisioning_deadline_seconds: Seconds = Field(86400, description="Longest time that a run whose pods were "
        "ready once waits for lost ones to be ready again; queued time is not counted.")
    stall_timeout_seconds: Seconds = Field(
        STALL_TIMEOUT_SECONDS,
        description="Longest time in which the run does not get further, by its own account "
        "(status.progress.activityTime), while Running. The driver's own waits for starts, training, rewards and files "
        "end before.",
    )
    ttl_seconds_after_finished: Annotated[
        int, Field(ge=0, le=315_360_000)
    ] | None = Field(None, description="Delete the RLHFJob "
        "this long after its end.")
    cleanup: CleanupSpec = Field(default_factory=CleanupSpec, description="What becomes of the RayCluster at the end.")
    final_save: bool = Field(False, description="kubectl delete waits until the driver has finished its step and "
        "saved, at most finalSaveTimeoutSeconds. A namespace that is deleted waits for nothing.")
    final_save_timeout_seconds: Annotated[int, Field(ge=1, le=86400)] = Field(600, description="Longest time that "
        "finalSave holds a deletion back.")


class QueueSpec(Model):
    name: Annotated[str, Field(min_length=1, max_length=63, pattern=SUBDOMAIN)] = Field(
        description="Kueue LocalQueue in the job's namespace; as a label's value has it, so 63 characters at most."
    )


class PodOverrides(Model):
    """Additions to one kind of pod. Fields that are not listed go into the PodSpec as they are."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="allow", frozen=True,
        json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
    )

    labels: Annotated[dict[str, str], _foreign(kubernetes.LABELS)] = Field(
        default_factory=dict, description="Labels of the pods.",
    )
    annotations: Annotated[
        dict[str, str], _foreign(kubernetes.ANNOTATIONS)
    ] = Field(default_factory=dict, description="Annotations of the "
        "pods.")
    env: list[
        Annotated[FreeObject, _foreign(kubernetes.ENV_VAR)]
    ] = Field(default_factory=list, max_length=256, description="Environment of "
        "Ray's container (and the driver's, in the head).")
    env_from: list[
        Annotated[FreeObject, _foreign(kubernetes.ENV_FROM)]
    ] = Field(default_factory=list, max_length=64, description="Environment from "
        "ConfigMaps and Secrets.")
    volumes: list[Annotated[FreeObject, _foreign(kubernetes.VOLUME)]] = Field(
        default_factory=list, max_length=64, description="Volumes of the pods.",
    )
    volume_mounts: list[
        Annotated[FreeObject, _foreign(kubernetes.VOLUME_MOUNT)]
    ] = Field(default_factory=list, max_length=64, description="Mounts in Ray's "
        "container (and the driver's, in the head).")
    resources: Resources = Field(default_factory=dict, description="Requests and limits of Ray's container. GPUs are "
        "added by the operator.")
    container_security_context: Annotated[
        FreeObject, _foreign(kubernetes.CONTAINER_SECURITY)
    ] = Field(default_factory=dict, description="Merged into the "
        "securityContext of each of the operator's containers, which meets the restricted Pod Security Standard. "
        "The pod's own is securityContext.")
    ipc_lock: bool = Field(False, description="Give the containers the capability IPC_LOCK, which RDMA needs. The pod "
        "then no longer meets the restricted standard.")

    @model_validator(mode="after")
    def _shallow_rest(self) -> "PodOverrides":
        _shallow(self.model_extra or {})
        return self


class DriverOverrides(Model):
    """Of the driver's container, in the head pod."""

    resources: Resources = Field(default_factory=dict, description="Requests and limits. Unset requests are 100m of "
        "CPU and 512Mi.")


class PodsSpec(Model):
    head: PodOverrides = Field(default_factory=PodOverrides, description="The pod of Ray's head and of the driver. "
        "Holds no GPU.")
    driver: DriverOverrides = Field(default_factory=DriverOverrides, description="The driver's container, which "
        "shares the head pod.")
    trainer: PodOverrides = Field(default_factory=PodOverrides, description="Pods of the trainer; when Colocated, of "
        "trainer and engines.")
    rollout: PodOverrides = Field(default_factory=PodOverrides, description="Pods of the engines when Separated.")


class NetworkPolicySpec(Model):
    enabled: bool = Field(True, description="Make a NetworkPolicy that lets only the job's own pods, the operator and "
        "allowFrom reach the job's pods.")
    allow_from: list[
        Annotated[FreeObject, _foreign(kubernetes.NETWORK_PEER)]
    ] = Field(default_factory=list, max_length=64, description="NetworkPolicyPeers "
        "that may reach the job's pods too, such as a namespaceSelector of Prometheus.")


class RLHFJobSpec(Model):
    image: Annotated[str, Field(min_length=1, max_length=1024)] | None = Field(None, description="Worker image. "
        "Default: the platform's, where its operator has one.")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        "IfNotPresent", description="As in a container.",
    )
    model: PolicySpec = Field(description="The model to train.")
    algorithm: AlgorithmSpec = Field(default_factory=AlgorithmSpec, description="The algorithm and its numbers.")
    data: DataSpec = Field(description="Where prompts come from.")
    rewards: list[RewardSpec] = Field(min_length=1, max_length=16, description="Rewards; their weighted sum is what "
        "is maximised.")
    critic: CriticSpec | None = Field(None, description="The value model of ppo, which has one by these defaults when "
        "this is unset.")
    reference: ReferenceSpec | None = Field(None, description="The frozen model of the KL term, which is there by "
        "these defaults when this is unset.")
    rollout: RolloutSpec = Field(default_factory=RolloutSpec, description="Generation.")
    trainer: TrainerSpec = Field(description="Training by FSDP2.")
    placement: PlacementSpec = Field(default_factory=PlacementSpec, description="Which roles share which GPUs.")
    weight_sync: WeightSyncSpec = Field(default_factory=WeightSyncSpec, description="How new weights reach the "
        "engines.")
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec, description="Where and how often the run is "
        "saved.")
    evaluation: list[EvaluationSpec] = Field(default_factory=list, max_length=16, description="Prompts on which the "
        "policy is judged by the same rewards, without training on them.")
    telemetry: TelemetrySpec = Field(default_factory=TelemetrySpec, description="Where metrics and samples go.")
    run_policy: RunPolicySpec = Field(default_factory=RunPolicySpec, description="Retries, deadlines, cleanup.")
    queue: QueueSpec | None = Field(None, description="Queue that admits the job.")
    suspend: bool = Field(False, description="Save, then release every pod. Set back to false to resume. While it is "
        "true most of the spec may be changed.")
    network_policy: NetworkPolicySpec = Field(default_factory=NetworkPolicySpec, description="Who may reach the job's "
        "pods.")
    pods: PodsSpec = Field(default_factory=PodsSpec, description="Additions to the pods. Changes take effect when the "
        "RayCluster is next created.")


class ObjectMeta(Model):
    """The part of an object's metadata that decisions need."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)

    name: str
    namespace: str = "default"
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    finalizers: list[str] = Field(default_factory=list)
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None


class RLHFJob(Model):
    """A parsed RLHFJob. `status` is kept raw: only its record and progress are read back, by whoever needs them."""

    api_version: Literal["rlhf.dev/v1alpha1"] = "rlhf.dev/v1alpha1"
    kind: Literal["RLHFJob"] = "RLHFJob"
    metadata: ObjectMeta
    spec: RLHFJobSpec
    status: dict[str, Any] = Field(default_factory=dict)
