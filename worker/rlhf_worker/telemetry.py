"""What a run tells about itself besides its status: TensorBoard scalars and phase times."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class PhaseTimer:
    """Seconds by phase; a phase entered twice adds up, also when it raises."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Telemetry:
    """TensorBoard under `directory`. Steps from `first_step` on are purged: a resumed run logs them again."""

    def __init__(self, directory: Path, first_step: int = 0) -> None:
        self.directory = directory
        self._writer = SummaryWriter(str(directory), purge_step=first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
