"""What of another framework's options is more than a name: several that make one, and one that makes several."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rlhf_cli import convert_tables as tables

Raw = dict[str, Any]
REWARD = {"name": "reward", "type": "python", "function": "my_package:reward"}
IMAGE = "rlhf-worker:0.1.0"
# Numbers whose default is another in each framework: named where the configuration leaves them out.
TELLING = ("rollout.promptsPerStep", "rollout.samplesPerPrompt", "rollout.maxTokens", "data.maxPromptTokens",
    "trainer.learningRate", "algorithm.kl.coefficient")


@dataclass
class Conversion:
    """`given`: options by name, taken out as they are carried over; what is left was not."""

    framework: str
    given: Raw
    gpus: int | None
    spec: Raw = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def set(self, path: str, value: Any) -> None:
        *parents, last = path.split(".")
        node = self.spec
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value

    def get(self, path: str) -> Any:
        node: Any = self.spec
        for part in path.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node

    def whole(self, path: str) -> int | None:
        """None where it is not set, or no whole number."""
        found = self.get(path)
        return found if isinstance(found, int) else None

    def take(self, name: str, default: Any = None) -> Any:
        found = self.given.pop(name, default)
        return default if found is None else found

    def number(self, name: str, default: Any = None) -> Any:
        """What is no number, such as a shell's variable, stays among what is not carried over."""
        found = self.given.get(name)
        if found is None or (isinstance(found, int | float) and not isinstance(found, bool)):
            return self.take(name, default)
        return default


def _trl(made: Conversion) -> None:
    _clips(made, made.number("epsilon"))
    _trl_loss(made)
    device, accumulated = made.number("per_device_train_batch_size"), made.number("gradient_accumulation_steps", 1)
    generated = made.number("steps_per_generation", accumulated)
    group = made.whole("rollout.samplesPerPrompt") or 8
    if device:
        made.set("rollout.promptsPerStep", max(1, device * generated * (made.gpus or 1) // group))
        _updates(made, generated, accumulated)
        if made.gpus is None:
            made.notes.append("rollout.promptsPerStep is that of one GPU: give --gpus")
    if not made.take("use_peft", "lora" in made.spec.get("model", {})):
        made.spec.get("model", {}).pop("lora", None)
    if made.take("bf16") is False and not made.get("model.dtype"):
        made.set("model.dtype", "float32")
    if made.take("use_vllm") is False:
        made.notes.append("use_vllm false: engines are vLLM's here; rollout.engine hf is transformers' generate")
    if made.take("vllm_importance_sampling_correction") is False:
        made.set("algorithm.correction.tokenCap", 0)
    weights = made.take("reward_weights")
    if weights:
        made.notes.append(f"rewards: set their weights to {weights}")
    _sampling(made, made.number("top_k", 0), made.number("top_p", 1.0))


def _trl_loss(made: Conversion) -> None:
    """An algorithm or its aggregation; what is no such thing here stays among what is not carried over."""
    kind, level = made.given.get("loss_type"), made.given.get("importance_sampling_level")
    if kind is None and level != "sequence":
        made.notes.append("algorithm.lossAggregation: loss_type is not given, and trl's default is another in each of "
            "its versions")
    if level in ("token", "sequence"):
        made.take("importance_sampling_level")
    if level == "sequence":
        made.set("algorithm.name", "gspo")
    elif kind in ("dr_grpo", "cispo"):
        made.set("algorithm.name", made.take("loss_type"))
    if kind in tables.TRL_LOSSES:
        made.set("algorithm.lossAggregation", tables.TRL_LOSSES[made.take("loss_type")])


def _verl(made: Conversion) -> None:
    actor = "actor_rollout_ref.actor."
    _clips(made, made.number(f"{actor}clip_ratio"))
    _files(made, made.take("data.train_files"))
    tests, every = made.take("data.val_files"), made.number("trainer.test_freq")
    if tests:
        path = tests[0] if isinstance(tests, list) else tests
        if isinstance(tests, list) and len(tests) > 1:
            made.notes.append(f"evaluation: {len(tests)} files are given, the first is taken: write a set for each")
        made.set("evaluation", [{"name": "val", "data": {"parquet": {"path": path}},
            **({"everySteps": every} if isinstance(every, int) and every > 0 else {})}])
    in_loss, weight = made.take(f"{actor}use_kl_loss", False), made.take(f"{actor}kl_loss_coef", 0.001)
    kind, of_reward = made.take(f"{actor}kl_loss_type", "low_var_kl"), made.take("algorithm.kl_penalty", "kl")
    in_reward, other = made.take("algorithm.use_kl_in_reward", False), made.take("algorithm.kl_ctrl.kl_coef", 0.001)
    if in_loss or in_reward:
        estimator = tables.ESTIMATORS.get(named := kind if in_loss else of_reward)
        if estimator is None:
            made.notes.append(f"algorithm.kl.estimator: {named} is none of {', '.join(sorted(tables.ESTIMATORS))}")
        made.set("algorithm.kl", {"coefficient": weight if in_loss else other, "place": "loss" if in_loss else "reward",
            **({"estimator": estimator} if estimator and in_loss else {})})
    _gae(made, "algorithm.adv_estimator")
    _updates(made, made.whole("rollout.promptsPerStep"), made.number(f"{actor}ppo_mini_batch_size"))
    if rank := made.number("actor_rollout_ref.model.lora_rank", 0):
        made.set("model.lora.rank", rank)
    else:
        made.spec.get("model", {}).pop("lora", None)
    if made.take("reward_model.enable", False) and (path := made.take("reward_model.model.path")):
        made.set("rewards", [{"name": "model", "type": "model", "model": {"path": path}}])
    nodes = made.number("trainer.nnodes", 1)
    made.gpus = made.gpus or (made.whole("placement.gpusPerNode") or 1) * nodes
    if (made.whole("checkpoint.everySteps") or 1) < 0:  # never
        made.spec.pop("checkpoint")
    made.take("actor_rollout_ref.model.use_remove_padding")
    drawn = "actor_rollout_ref.rollout.top_"
    _sampling(made, made.number(f"{drawn}k", -1), made.number(f"{drawn}p", 1.0))
    if (engine := made.take("actor_rollout_ref.rollout.name", "vllm")) != "vllm":
        made.notes.append(f"rollout.name {engine}: engines are vLLM's here")


def _openrlhf(made: Conversion) -> None:
    both = made.take("eps_clip_low_high")
    if isinstance(both, list) and len(both) == 2:
        made.set("algorithm.clipLow", both[0])
        made.set("algorithm.clipHigh", both[1])
    _clips(made, made.number("eps_clip"))
    _gae(made, "advantage_estimator")
    _files(made, made.take("prompt_data"))
    if made.get("algorithm.kl.coefficient"):
        made.set("algorithm.kl.place", "loss" if made.take("use_kl_loss", False) else "reward")
    samples = (made.whole("rollout.promptsPerStep") or 0) * (made.whole("rollout.samplesPerPrompt") or 1)
    _updates(made, samples, made.number("train_batch_size"))
    nodes = made.number("actor_num_nodes", 1)
    made.gpus = made.gpus or (made.whole("placement.gpusPerNode") or 1) * nodes
    made.set("placement.mode", "Colocated" if made.take("colocate_all_models", False) else "Separated")
    if rank := made.number("lora_rank", 0):
        made.set("model.lora.rank", rank)
    else:
        made.spec.get("model", {}).pop("lora", None)
    if path := made.take("reward_pretrain"):
        names = str(path).split(",")
        made.set("rewards", [{"name": f"model-{at}", "type": "model", "model": {"path": one}}
            for at, one in enumerate(names)])
    made.take("bf16")
    made.take("packing_samples")
    made.take("enable_vllm_is_correction")  # algorithm.correction is on by default
    _sampling(made, 0, made.number("top_p", 1.0))


def _gae(made: Conversion, option: str) -> None:
    """PPO is the default of verl and OpenRLHF, GRPO here."""
    if made.get("algorithm.name") is None and option not in made.given:
        made.set("algorithm.name", "ppo")
        made.notes.append(f"algorithm.name: {option} is not given, which is ppo (gae) there")


def _clips(made: Conversion, both: Any) -> None:
    """One clip for both sides, where the sides have none of their own."""
    for path in ("algorithm.clipLow", "algorithm.clipHigh") if both is not None else ():
        if made.get(path) is None:
            made.set(path, both)


def _updates(made: Conversion, whole: Any, part: Any) -> None:
    if whole and part and whole > part:
        made.set("trainer.updatesPerStep", max(1, round(whole / part)))


def _files(made: Conversion, files: Any) -> None:
    """Parquet and JSON lines by their names, anything else a dataset of the hub."""
    if files is None:
        return
    paths = files if isinstance(files, list) else str(files).split(",")
    if len(paths) > 1:
        made.notes.append(f"data: {len(paths)} files are given, the first is taken: write data.sources for all")
    path = str(paths[0]).partition("@")[2] or str(paths[0])
    split = (made.spec.setdefault("data", {}).pop("dataset", None) or {}).get("split")
    if path.endswith((".jsonl", ".json")):
        made.set("data.jsonl.path", path)
    elif path.endswith(".parquet"):
        made.set("data.parquet.path", path)
    else:
        made.set("data.dataset", {"path": path, **({"split": split} if split else {})})


def _sampling(made: Conversion, top_k: Any, top_p: Any) -> None:
    """In training topP is taken with topK alone, so that the trainer knows what was drawn from."""
    if isinstance(top_k, int) and top_k > 0:
        made.set("rollout.sampling.topK", min(top_k, 256))
    if top_p is not None and top_p < 1:
        if made.get("rollout.sampling.topK"):
            made.set("rollout.sampling.topP", top_p)
        else:
            made.notes.append(f"top_p {top_p}: in training it needs rollout.sampling.topK beside it")


def common(made: Conversion) -> None:
    """What every job needs, and what the numbers of GPUs give."""
    made.set("image", IMAGE)
    if not made.get("model.path"):
        made.set("model.path", "my/model")
        made.notes.append("model.path: none is given")
    made.set("trainer.gpus", made.gpus or 1)
    size = made.whole("rollout.tensorParallelSize") or 1
    if made.get("placement.mode") != "Separated":
        made.set("rollout.engines", max(1, (made.gpus or 1) // size))
    if not made.get("trainer.steps"):
        made.set("trainer.steps", 100)
        made.notes.append("trainer.steps: epochs of the data are no number of steps: set it (100 stands there)")
    if not made.get("data"):
        made.set("data", {"jsonl": {"path": "/data/prompts.jsonl"}})
        made.notes.append("data: none is given")
    if not made.get("rewards"):
        made.set("rewards", [REWARD])
        made.notes.append("rewards: functions are not carried over: name yours, f(prompt, completion, **row) -> float")
    if made.get("algorithm.name") != "ppo":
        for one in filter(None, (made.spec.pop("critic", None), made.spec.get("algorithm", {}).pop("gae", None))):
            made.notes.append(f"{made.get('algorithm.name') or 'grpo'} has no critic: left out is {one}")
    left = [path for path in TELLING if made.get(path) is None]
    if left:
        made.notes.append(f"left to {made.framework}'s defaults, which are others here: {', '.join(left)}")


Finish = Callable[[Conversion], None]
FRAMEWORKS: dict[str, tuple[dict[str, tables.To], tuple[str, ...], Finish]] = {
    "trl": (tables.TRL, tables.TRL_SPECIAL, _trl), "verl": (tables.VERL, tables.VERL_SPECIAL, _verl),
    "openrlhf": (tables.OPENRLHF, tables.OPENRLHF_SPECIAL, _openrlhf),
}  # fmt: skip
