"""Which role has which share of which GPU, drawn. Pure."""

from collections.abc import Iterator

from rlhf_api.placement import Placement

CELLS = 20  # of one GPU's bar
MOST_GPUS = 16  # drawn one by one; of more, the first of equal ones
FILLS = {"trainer": "█", "engine": "▒"}
FREE = "·"


def shares(placement: Placement) -> list[dict[str, float]]:
    """Of each slot: its roles, such as "trainer 0" or "engine 1", with their fraction of the GPU."""
    slots: list[dict[str, float]] = [{} for _ in range(placement.gpus)]
    for rank, slot in enumerate(placement.trainer_slots):
        slots[slot][f"trainer {rank}"] = placement.trainer_fraction
    for role, own in placement.role_slots.items():
        for rank, slot in enumerate(own):
            slots[slot][f"{role} {rank}"] = 1.0
    for number, own in enumerate(placement.engine_slots):
        for rank, slot in enumerate(own):
            name = f"engine {number}" + (f".{rank}" if len(own) > 1 else "")
            slots[slot][name] = placement.engine_fraction
    return slots


def drawn(placement: Placement) -> Iterator[str]:
    """A line a pod group, then one a GPU: `gpu 0  ████████▒▒▒▒▒▒▒▒····  trainer 0 0.40  engine 0 0.40`.

    Roles whose shares sum to more than the GPU take turns on it; their bar shows the one beside the other all the same.
    """
    slots = shares(placement)
    for group in placement.groups:
        pods = f"{group.pods} pod{'s' if group.pods > 1 else ''} of {group.gpus_per_pod} GPU"
        yield f"{group.name}: {pods}{'s' if group.gpus_per_pod > 1 else ''} ({placement.resource_name})"
        for slot in list(group.slots)[:MOST_GPUS]:
            roles = "  ".join(f"{name} {share:.2f}" for name, share in slots[slot].items())
            turns = " (in turns)" if sum(slots[slot].values()) > 1 else ""
            yield f"  gpu {slot:<3} {bar(slots[slot])}  {roles or 'unused'}{turns}"
        if len(group.slots) > MOST_GPUS:
            yield f"  … and {len(group.slots) - MOST_GPUS} more alike"


def bar(roles: dict[str, float]) -> str:
    cells, whole = "", max(1.0, sum(roles.values()))
    for name, share in roles.items():
        fill = FILLS["engine" if name.startswith("engine") else "trainer"]
        cells += fill * min(CELLS - len(cells), round(share / whole * CELLS))
    return cells.ljust(CELLS, FREE)
