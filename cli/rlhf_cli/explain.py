"""`kubectl rlhf explain`: what a manifest will become, before it runs. Pure but for the files that it is given."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_api.job import RLHFJob, RLHFJobSpec
from rlhf_api.memory import GIB, engine_share
from rlhf_api.parse import parse_job
from rlhf_api.placement import Placement, plan_placement
from rlhf_cli import placement as drawing
from rlhf_cli.exits import Exit, Wrong
from rlhf_cli.manifest import load
from rlhf_cli.model_shape import Shape
from rlhf_cli.options import Output
from rlhf_cli.predict import GPUS, Gpu, cached_sequences, fixes, longest, misfits, moments, resolved, seconds
from rlhf_cli.text import in_words
from rlhf_client.errors import nearest

Raw = dict[str, Any]


def explain(filename: Path, config: Path | None, gpu: str, length: int | None, output: Output) -> int:
    """The exit code: USAGE where something does not fit. Raises Wrong."""
    if gpu not in GPUS:
        raise Wrong(f"--gpu {gpu}{nearest(gpu, list(GPUS))}: one of {', '.join(GPUS)}")
    raw = load(filename)
    job = parse_job({**raw, "metadata": {"namespace": "default", **raw["metadata"]}})
    shape, found = _shape(job.spec, config), GPUS[gpu]
    length = min(length or job.spec.rollout.max_tokens, job.spec.rollout.max_tokens)
    facts = told(job, shape, found, length)
    if output is Output.JSON:
        import json

        print(json.dumps(facts, indent=2))
    else:
        for line in page(job, shape, found, length):
            print(line)
    return int(Exit.USAGE if facts["misfits"] else Exit.OK)


def _shape(spec: RLHFJobSpec, config: Path | None) -> Shape | None:
    """Of the config that was given, or of a checkpoint that lies on this machine too."""
    if config is not None:
        return Shape.read(config / "config.json" if config.is_dir() else config)
    local = Path(spec.model.path) / "config.json"
    return Shape.read(local) if local.is_file() else None


def told(job: RLHFJob, shape: Shape | None, gpu: Gpu, length: int) -> Raw:
    """For programs. Without a shape: pods and shares alone."""
    placement = plan_placement(job.spec)
    facts: Raw = {
        "pods": [{"role": "head", "pods": 1, "gpusPerPod": 0}, *(
            {"role": group.name, "pods": group.pods, "gpusPerPod": group.gpus_per_pod} for group in placement.groups
        )],
        "gpus": placement.gpus, "slots": drawing.shares(placement), "misfits": [], "fixes": [],
    }  # fmt: skip
    if shape is None:
        return facts
    wrong = misfits(job.spec, shape, gpu)
    expected = seconds(job.spec, shape, gpu, length)
    return facts | {
        "parameters": shape.parameters, "gpu": gpu.name,
        "memory": [{**asdict(one), "bytes": one.bytes} for one in moments(job.spec, shape, gpu)],
        "seconds": {**asdict(expected), "step": expected.step, "run": expected.step * job.spec.trainer.steps},
        "misfits": wrong, "fixes": fixes(job.spec, shape, gpu) if wrong else [],
    }


def page(job: RLHFJob, shape: Shape | None, gpu: Gpu, length: int) -> Iterator[str]:
    placement = plan_placement(job.spec)
    yield f"{job.metadata.name}: {job.spec.algorithm.name}, {placement.mode}, {placement.gpus} GPUs"
    yield "\npods"
    yield f"  {job.metadata.name}-1-head: Ray's head and the driver, no GPU"
    yield from (f"  {line}" for line in drawing.drawn(placement))
    yield f"\nRay's placement group: {_bundles(placement)}"
    if shape is None:
        why = f"{job.spec.model.path} is not on this machine: give its config.json (--config)"
        yield f"\nmemory and seconds are not told: {why}"
        return
    yield from _memory(job.spec, shape, gpu)
    yield from _time(job.spec, shape, gpu, length)
    if wrong := misfits(job.spec, shape, gpu):
        yield "\ndoes not fit"
        yield from (f"  {words}" for words in wrong)
        yield "\nany one of these is enough"
        yield from (f"  {words}" for words in fixes(job.spec, shape, gpu))


def _bundles(placement: Placement) -> str:
    """One a GPU, packed."""
    return ", ".join(f"{len(group.slots)} x {{GPU: 1, {group.ray_resource}: 1}}" for group in placement.groups)


def _memory(spec: RLHFJobSpec, shape: Shape, gpu: Gpu) -> Iterator[str]:
    yield f"\nmemory of a GPU ({gpu.name}, {gpu.bytes / GIB:.0f} GiB), {shape.parameters / 1e9:.2f} B parameters"
    for one in moments(spec, shape, gpu):
        parts = {"roles": one.roles, "activations": one.activations, "engine": one.engine}
        listed = " + ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size)
        fits = "" if one.bytes <= gpu.bytes else "   TOO MUCH"
        yield f"  {one.name:<12}{one.bytes / GIB:6.1f} GiB = {listed} + reserve 2.0{fits}"
    if spec.rollout.engine == "vllm":
        held = cached_sequences(spec, shape, gpu, longest(spec))
        yield f"  an engine takes {engine_share(resolved(spec)):.0%}: {max(0, int(held))} longest sequences at once"


def _time(spec: RLHFJobSpec, shape: Shape, gpu: Gpu, length: int) -> Iterator[str]:
    found = seconds(spec, shape, gpu, length)
    told = "as docs/benchmarks.md has an H200's" if gpu.name == "h200" else "not measured on this GPU"
    yield f"\nseconds of a step, completions of {length} tokens, {told}"
    for name in ("generate", "forward", "train", "sync"):
        yield f"  {name:<12}{getattr(found, name):8.2f}"
    side = ", generating while it trains" if found.overlapped else ""
    whole = in_words(found.step * spec.trainer.steps)
    yield f"  {'step':<12}{found.step:8.2f}{side}: {spec.trainer.steps} steps are {whole}"
