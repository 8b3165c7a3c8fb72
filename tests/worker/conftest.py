"""What several of the worker's tests begin with. Imports wait for those that need them: pure tests do without torch."""

from collections.abc import Iterator
from pathlib import Path

import pytest


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
