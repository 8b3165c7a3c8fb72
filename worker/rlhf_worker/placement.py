"""Roles to GPUs: one placement group with one bundle a slot, slots tied to bundles, and the proof afterwards.

`rlhf_api.placement` decided which role has which slot; here slots become Ray bundles and actors.
"""

import contextlib
import os
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_api.job import PlacementMode
from rlhf_api.placement import Placement
from rlhf_worker.calls import gather
from rlhf_worker.errors import PlacementFailed
from rlhf_worker.stop import interrupt_if_asked

LOOK_SECONDS = 600.0
PROBE_SHARE = 0.001  # of a GPU, for the moment of looking at a bundle


@dataclass(frozen=True, slots=True)
class Seat:
    """A process's place: host, and the GPU's UUID (CUDA) or Ray's number of the logical GPU (CPU)."""

    node: str
    gpu: str

    @classmethod
    def here(cls, device: str) -> "Seat":
        """Of the calling Ray actor, which must hold (a share of) one GPU."""
        if device == "cuda":
            import torch

            return cls.of_uuid(str(torch.cuda.get_device_properties(0).uuid))
        return cls.of_uuid(_held_gpus())

    @classmethod
    def of_uuid(cls, uuid: str) -> "Seat":
        """On this host. vLLM's own worker processes are no Ray workers, so the host's name stands for the node."""
        return cls(node=socket.gethostname(), gpu=uuid)

    def __str__(self) -> str:
        return f"{self.node}/{self.gpu}"


def _held_gpus() -> str:
    """Ray's numbers of what the calling worker holds, one as a rule."""
    return ",".join(map(str, ray.get_runtime_context().get_accelerator_ids().get("GPU", [])))


@dataclass(frozen=True, slots=True)
class Bundle:
    """What a look into a bundle found."""

    index: int
    node: str
    gpu: str
    device: str  # "cuda" | "cpu"
    cpus: int


@dataclass(frozen=True, slots=True)
class Stage:
    """The placement group with its slots tied to bundles."""

    group: PlacementGroup
    bundles: dict[int, Bundle]  # by slot

    @property
    def device(self) -> str:
        return self.bundles[0].device

    def options(self, slot: int, share: float) -> dict[str, Any]:
        """Of an actor that takes `share` of the slot's GPU."""
        return _options(self.group, self.bundles[slot].index, share)

    def threads(self, slots: Sequence[int]) -> dict[int, int]:
        """CPU threads for one process a slot when all of these compute at the same time."""
        crowd = Counter(self.bundles[slot].node for slot in slots)
        return {slot: max(1, self.bundles[slot].cpus // crowd[self.bundles[slot].node]) for slot in slots}

    def visible(self, slot: int) -> list[str]:
        """Ray's numbers of the GPUs of the slot's node, the slot's own first."""
        own = self.bundles[slot]
        return [
            own.gpu,
            *sorted({b.gpu for b in self.bundles.values() if b.node == own.node and b.gpu != own.gpu}, key=_number)
        ]

    def close(self) -> None:
        remove_placement_group(self.group)


def ray_share(placement: Placement) -> float:
    """Of a GPU, as Ray counts it, of each actor on it: so that it finds room for all that share it. Of memory Ray knows
    nothing: there each role has its own fraction.
    """
    return 0.5 if placement.mode is PlacementMode.COLOCATED and placement.engine_slots else 1.0


def wanted_bundles(placement: Placement) -> list[dict[str, float]]:
    """One a slot, in the order of the slots."""
    return [{"GPU": 1, group.ray_resource: 1} for group in placement.groups for _ in group.slots]


class Patience:
    """A deadline that counts only while `counts`: what Kubernetes has not given yet, its own clocks end."""

    def __init__(self, seconds: float, counts: Callable[[], bool]) -> None:
        self.seconds, self._counts = seconds, counts
        self._end = time.monotonic() + seconds

    @property
    def over(self) -> bool:
        if not self._counts():
            self._end = time.monotonic() + self.seconds
        return time.monotonic() > self._end


def reserve(
    placement: Placement, patience: Patience, name: str, tell: Callable[[str], None] = lambda missing: None
) -> Stage:
    """Wait for every GPU of the run; `tell` is called about once a second with what is missing. Raises PlacementFailed.

    A group of that name is a dead predecessor's, which Ray has not buried yet: it goes first, and its actors with it.
    """
    _remove_left(name)
    wanted = wanted_bundles(placement)
    group = placement_group(wanted, strategy="PACK", name=name)
    while not group.wait(timeout_seconds=1):
        interrupt_if_asked()
        missing = shortage(placement, ray.cluster_resources())
        tell(missing)
        if patience.over:
            remove_placement_group(group)
            ready = f"though all pods have been ready for {patience.seconds:g} s"
            raise PlacementFailed(f"no placement for {len(wanted)} GPUs, {ready}: {missing}")
    look = ray.remote(_look)
    calls = [look.options(**_options(group, index, PROBE_SHARE)).remote(index) for index in range(len(wanted))]
    return Stage(group, tie(placement, gather(calls, LOOK_SECONDS, "look at the GPUs")))


def _remove_left(name: str) -> None:
    with contextlib.suppress(ValueError):  # what Ray raises when there is none
        remove_placement_group(get_placement_group(name))


def shortage(placement: Placement, has: dict[str, float]) -> str:
    """Asked and there, a resource each."""
    asked = {"GPU": placement.gpus} | {group.ray_resource: len(group.slots) for group in placement.groups}
    return ", ".join(f"{name}: asked {count}, Ray has {has.get(name, 0):g}" for name, count in asked.items())


def _options(group: PlacementGroup, index: int, share: float) -> dict[str, Any]:
    """num_cpus=0: a bundle holds no CPUs."""
    strategy = PlacementGroupSchedulingStrategy(
        placement_group=group, placement_group_bundle_index=index, placement_group_capture_child_tasks=False,
    )
    return {"num_gpus": share, "num_cpus": 0, "scheduling_strategy": strategy}


def _look(index: int) -> Bundle:
    """Runs in the bundle. Must stay cheap: it imports neither torch nor vLLM."""
    return Bundle(
        index, ray.get_runtime_context().get_node_id(), _held_gpus(), device_here(), len(os.sched_getaffinity(0)),
    )


def device_here() -> str:
    """cuda where there is a GPU and the GPU build of vLLM, else cpu."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return "cpu"
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def tie(placement: Placement, found: Sequence[Bundle]) -> dict[int, Bundle]:
    """Slots to bundles: those of one pod on one node, in the order of its GPUs. Raises PlacementFailed."""
    tied: dict[int, Bundle] = {}
    for group in placement.groups:
        by_node: dict[str, list[Bundle]] = defaultdict(list)
        for bundle in found[group.first_slot : group.first_slot + len(group.slots)]:
            by_node[bundle.node].append(bundle)
        # Full nodes first: a node with a remainder (many pods on one machine) cannot break up the pods after it.
        nodes = sorted(by_node.items(), key=lambda item: (-len(item[1]), item[0]))
        ordered = [b for _, bundles in nodes for b in sorted(bundles, key=lambda b: (_number(b.gpu), b.index))]
        tied |= dict(zip(group.slots, ordered, strict=True))
    for engine, slots in enumerate(placement.engine_slots):
        if len({tied[slot].node for slot in slots}) > 1:
            raise PlacementFailed(f"engine {engine} would lie on several nodes: {[tied[slot].node for slot in slots]}")
    return tied


def _number(gpu: str) -> tuple[int, str]:
    return (int(gpu), "") if gpu.isdigit() else (-1, gpu)


def check_seats(
    placement: Placement, trainer: Sequence[Seat], engines: Sequence[Sequence[Seat]], own: Mapping[str, Sequence[Seat]],
) -> None:
    """Roles meant to share a GPU do, those meant not to share do not. Raises PlacementFailed.

    trainer: one a rank; engines: one a tensor-parallel rank of each engine; own: one a rank of each role with GPUs of
    its own. Ranks of one engine may swap GPUs among themselves. """
    _all_different("trainer ranks", trainer)
    engine_seats = [seat for engine in engines for seat in engine]
    _all_different("engine ranks", engine_seats)
    for name, seats in own.items():
        others = {seat for other, sat in own.items() if other != name for seat in sat}
        if shared := set(seats) & {*trainer, *engine_seats, *others}:
            raise PlacementFailed(f"{name} has GPUs of its own, but shares {_names(shared)}")
        _all_different(f"{name} ranks", seats)
    by_slot = dict(zip(placement.trainer_slots, trainer, strict=True))
    if placement.mode is PlacementMode.SEPARATED:
        if shared := set(trainer) & set(engine_seats):
            raise PlacementFailed(f"trainer and engines are Separated but share {_names(shared)}")
        return
    for index, (slots, seats) in enumerate(zip(placement.engine_slots, engines, strict=True)):
        expected = {by_slot[slot] for slot in slots}
        if expected != set(seats):
            raise PlacementFailed(f"engine {index} is Colocated with trainer ranks on {_names(expected)} but runs on "
                f"{_names(seats)}")


def _all_different(what: str, seats: Sequence[Seat]) -> None:
    if twice := [str(seat) for seat, count in Counter(seats).items() if count > 1]:
        raise PlacementFailed(f"several {what} on one GPU: {', '.join(twice)}")


def _names(seats: Any) -> str:
    return ", ".join(sorted(map(str, seats)))

