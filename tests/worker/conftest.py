"""What several of the worker's tests begin with. Imports wait for those that need them: pure tests do without torch."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _no_ray_by_itself(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ray starts by itself at its first `put` or `get`, and then no later test can start one of its own."""
    before = _has_ray()
    yield
    if not before and _has_ray() and request.node.get_closest_marker("ray") is None:
        sys.modules["ray"].shutdown()
        pytest.fail("this test has no mark `ray`, and began a Ray")


def _has_ray() -> bool:
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with its prompts and its reward model."""
    from hack.tiny_model import write

    path = tmp_path_factory.mktemp("tiny")
    write(path)
    return path


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A gloo group of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
