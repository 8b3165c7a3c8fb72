"""`kubectl rlhf convert`: a configuration of TRL, verl or OpenRLHF as an RLHFJob, and what of it is none."""

import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf_cli import convert_tables as tables
from rlhf_cli.exits import Wrong
from rlhf_cli.manifest import text_of
from rlhf_client.errors import nearest

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


def read(path: Path) -> tuple[str, Raw]:
    """Options of a YAML file or of a shell script, by their names with dots, and the framework that has them. Raises
    Wrong.
    """
    text = text_of(path)
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError:
        loaded = None
    given = flat(loaded) if isinstance(loaded, dict) else of_script(text, path)
    return framework_of(given), given


def flat(node: Raw, prefix: str = "") -> Raw:
    found: Raw = {}
    for name, value in node.items():
        path = f"{prefix}{name}"
        found |= flat(value, f"{path}.") if isinstance(value, dict) and value else {path: value}
    return found


def of_script(text: str, path: Path) -> Raw:
    """`--name value`, `--flag`, `name=value` and `+name=value` of command lines; comments are left out."""
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise Wrong(f"{path}: neither YAML nor a shell script: {error}") from None
    found: Raw = {}
    for at, word in enumerate(words):
        name, equals, value = word.lstrip("+").partition("=")
        if word.startswith("--"):
            name = name[2:].replace("-", "_")
            values = [value] if equals else _values(words[at + 1:])
            found[name] = _parsed(values)
        elif equals and re.fullmatch(r"[A-Za-z_][\w.]*\.[\w.]+", name):
            found[name] = _parsed([value])
    return found


def _values(words: list[str]) -> list[str]:
    """Up to the next option."""
    found = []
    for word in words:
        if word.startswith("--") or re.fullmatch(r"[&|;]+", word):
            break
        found.append(word)
    return found


def _parsed(values: list[str]) -> Any:
    read = [_number(yaml.safe_load(value)) if "$" not in value else value for value in values]
    return True if not read else read[0] if len(read) == 1 else read


def _number(value: Any) -> Any:
    """YAML takes 1e-6 for a text, command lines for a number."""
    try:
        return float(value) if isinstance(value, str) and re.fullmatch(r"[\d.]+[eE][+-]?\d+", value) else value
    except ValueError:
        return value


def framework_of(given: Raw) -> str:
    """By the options that are a framework's own. Raises Wrong."""
    known = {name: {*table, *special} for name, (table, special, _) in FRAMEWORKS.items()}
    counts = {name: len(options & set(given)) for name, options in known.items()}
    best = max(counts, key=lambda name: counts[name])
    if not counts[best]:
        raise Wrong(f"no configuration of {', '.join(FRAMEWORKS)}: none of its options is one of theirs")
    return best


def convert(framework: str, given: Raw, gpus: int | None) -> Conversion:
    """Raises Wrong for a framework that is none of these."""
    if framework not in FRAMEWORKS:
        raise Wrong(f"--from {framework}{nearest(framework, list(FRAMEWORKS))}: one of {', '.join(FRAMEWORKS)}")
    table, _, finish = FRAMEWORKS[framework]
    made = Conversion(framework, dict(given), gpus)
    for name, to in table.items():
        value = made.given.get(name)
        if value is None or (to.values is not None and value not in to.values):
            continue
        made.set(to.path, to.values[value] if to.values is not None else _number(value))
        del made.given[name]
    finish(made)
    _common(made)
    return made


def _trl(made: Conversion) -> None:
    _clips(made, made.number("epsilon"))
    kind, level = made.take("loss_type"), made.take("importance_sampling_level", "token")
    if level == "sequence":
        made.set("algorithm.name", "gspo")
    elif kind in ("dr_grpo", "cispo"):
        made.set("algorithm.name", kind)
    elif kind is not None:
        made.set("algorithm.lossAggregation", "sequences" if kind == "grpo" else "tokens")
    device, accumulated = made.number("per_device_train_batch_size"), made.number("gradient_accumulation_steps", 1)
    group = made.whole("rollout.samplesPerPrompt") or 8
    if device:
        made.set("rollout.promptsPerStep", max(1, device * accumulated * (made.gpus or 1) // group))
        if made.gpus is None:
            made.notes.append("rollout.promptsPerStep is that of one GPU: give --gpus")
    if not made.take("use_peft", "lora" in made.spec.get("model", {})):
        made.spec.get("model", {}).pop("lora", None)
    made.take("bf16")
    made.take("use_vllm")
    weights = made.take("reward_weights")
    if weights:
        made.notes.append(f"rewards: set their weights to {weights}")
    _sampling(made, made.number("top_k", 0), made.number("top_p", 1.0))


def _verl(made: Conversion) -> None:
    actor = "actor_rollout_ref.actor."
    _clips(made, made.number(f"{actor}clip_ratio"))
    _files(made, made.take("data.train_files"))
    tests, every = made.take("data.val_files"), made.number("trainer.test_freq")
    if tests:
        path = tests[0] if isinstance(tests, list) else tests
        made.set("evaluation", [{"name": "val", "data": {"parquet": {"path": path}},
            **({"everySteps": every} if isinstance(every, int) and every > 0 else {})}])
    in_loss, weight = made.take(f"{actor}use_kl_loss", False), made.take(f"{actor}kl_loss_coef", 0.001)
    kind, of_reward = made.take(f"{actor}kl_loss_type", "low_var_kl"), made.take("algorithm.kl_penalty", "kl")
    in_reward, other = made.take("algorithm.use_kl_in_reward", False), made.take("algorithm.kl_ctrl.kl_coef", 0.001)
    if in_loss or in_reward:
        estimator = tables.ESTIMATORS.get(kind if in_loss else of_reward)
        made.set("algorithm.kl", {"coefficient": weight if in_loss else other, "place": "loss" if in_loss else "reward",
            **({"estimator": estimator} if estimator and in_loss else {})})
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
    _sampling(made, 0, made.number("top_p", 1.0))


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


def _common(made: Conversion) -> None:
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
        made.spec.pop("critic", None)
        made.spec.get("algorithm", {}).pop("gae", None)
    left = [path for path in TELLING if made.get(path) is None]
    if left:
        made.notes.append(f"left to {made.framework}'s defaults, which are others here: {', '.join(left)}")


Finish = Callable[[Conversion], None]
FRAMEWORKS: dict[str, tuple[dict[str, tables.To], tuple[str, ...], Finish]] = {
    "trl": (tables.TRL, tables.TRL_SPECIAL, _trl), "verl": (tables.VERL, tables.VERL_SPECIAL, _verl),
    "openrlhf": (tables.OPENRLHF, tables.OPENRLHF_SPECIAL, _openrlhf),
}  # fmt: skip


def manifest(made: Conversion, name: str) -> tuple[str, list[str]]:
    """YAML, and every word about it: what was not carried over, what to look at, and what is not valid yet."""
    from rlhf_api.parse import InvalidJob, parse_job

    raw = {"apiVersion": "rlhf.dev/v1alpha1", "kind": "RLHFJob", "metadata": {"name": name}, "spec": ordered(made.spec)}
    left = (f"not carried over: {one} = {value}" for one, value in made.given.items() if _counts(value))
    words = [*made.notes, *left]
    try:
        parse_job(raw)
    except InvalidJob as error:
        words += [f"not valid yet: {problem}" for problem in error.problems]
    comments = "".join(f"# {line}\n" for word in words for line in str(word).splitlines())
    return f"# From {made.framework}.\n{comments}{yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)}", words


def _counts(value: Any) -> bool:
    """Whether it says anything: null and empty do not."""
    return value is not None and value != {} and value != [] and not (isinstance(value, float) and math.isnan(value))


def ordered(spec: Raw) -> Raw:
    """As the reference page has the fields."""
    from rlhf_api.job import RLHFJobSpec

    names = [field.alias or name for name, field in RLHFJobSpec.model_fields.items()]
    return {name: spec[name] for name in names if name in spec}


def verb(path: Path, framework: str | None, gpus: int | None, name: str, out: Path | None) -> None:
    """Raises Wrong."""
    from rlhf_cli.cluster_verbs import say

    found, given = read(path)
    text, words = manifest(convert(framework or found, given, gpus), name)
    for line in words:
        say(line)
    write(text, out)


def write(text: str, out: Path | None) -> None:
    """To a file, which must not be there, or standard output. Raises Wrong."""
    if out is None:
        print(text, end="")
        return
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise Wrong(f"--out {out}: is there already: remove it, or take another name") from None
    except OSError as error:
        raise Wrong(f"--out {out}: {error.strerror}") from None
    print(out)
