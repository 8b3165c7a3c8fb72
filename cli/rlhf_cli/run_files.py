"""What a run leaves in its checkpoint.path besides weights, read: also after a crash, half written, or in parts.

A file that cannot be read costs itself alone, and is named: `Run.unread`.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_cli.exits import NoFiles
from rlhf_cli.fetch import NEEDS, PARTS, RUN

Raw = dict[str, Any]
EVENTS = re.compile(r"events\.out\.tfevents\.(\d+)\..+")
SAMPLES = re.compile(r"step-(\d+)\.parquet")
ATTEMPT = re.compile(r"attempt-(\d+)")
CHECKPOINT = re.compile(r"step-(\d+)(?:\.attempt-(\d+)-[0-9a-f]{8})?")
# A line of the driver's last words: the class of an error, and what it says.
ERROR = re.compile(
    r"^(?:[\w.]+\.)?(?:[A-Z]\w*(?:Error|Exception|Failed|Exceeded|Lost|Broken|Mismatch|Taken)|BadSpec|BadData|Diverged|Fenced"
    r"|Passing|NotNumbered): .*", re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One head pod's driver: what it printed, as far as it was kept."""

    number: int
    log: str

    @property
    def error(self) -> str:
        """The last line that tells of one; empty where none does."""
        found = list(ERROR.finditer(self.log))
        return found[-1][0] if found else ""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`step` that it is of, `version` of the weights, `bytes` of its files."""

    name: str
    step: int
    attempt: int
    version: int
    bytes: int


@dataclass(slots=True)
class Run:
    root: Path
    unread: list[str] = field(default_factory=list)

    def miss(self, path: Path, error: object) -> None:
        self.unread.append(f"{path.relative_to(self.root)}: {error}")


def opened(root: Path) -> Run:
    """Raises NoFiles for a directory that is no checkpoint.path."""
    if not root.is_dir():
        raise NoFiles(f"{root}: no such directory")
    if not any(path.name in PARTS or CHECKPOINT.fullmatch(path.name) for path in root.iterdir() if path.is_dir()):
        raise NoFiles(f"{root}: no files of a run: a checkpoint.path holds {', '.join(PARTS)} and step-<n> directories")
    return Run(root)


# metrics


def scalars(run: Run) -> dict[str, dict[int, float]]:
    """By name, the value of each step. Steps that a resumed run took again have its values."""
    found: dict[str, dict[int, float]] = {}
    for path in _event_files(run.root / "tensorboard"):
        try:
            for event in _events(path):
                _take(event, found)
        except ImportError:
            raise NoFiles(NEEDS) from None
        except Exception as error:  # what a torn file makes of protobuf and TensorBoard
            run.miss(path, f"read up to a damaged record: {type(error).__name__}")
    return {name: dict(sorted(values.items())) for name, values in found.items() if values}


def _event_files(folder: Path) -> list[Path]:
    there = [path for path in folder.iterdir() if EVENTS.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(there, key=lambda path: (int(path.name.split(".")[3]), path.name))


def _events(path: Path) -> Iterator[Any]:
    """A record that is cut off ends the file."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    for record in RawEventFileLoader(str(path)).Load():
        yield Event.FromString(record)


def _take(event: Any, found: dict[str, dict[int, float]]) -> None:
    """A start of a session takes back what was logged from its step on, as TensorBoard itself has it."""
    if event.HasField("session_log") and event.session_log.status == event.session_log.START:
        for values in found.values():
            for step in [one for one in values if one >= event.step]:
                del values[step]
    for value in event.summary.value:
        if value.HasField("simple_value"):
            found.setdefault(value.tag, {})[event.step] = value.simple_value


# samples


def sample_files(run: Run) -> dict[int, Path]:
    """By step, in order."""
    folder = run.root / "rollouts"
    there = {int(match[1]): path for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := SAMPLES.fullmatch(path.name))}
    return dict(sorted(there.items()))


def samples(path: Path, columns: list[str] | None = None) -> list[Raw]:
    """Rows of one step, as the worker wrote them; of `columns` those that the file has. Raises NoFiles."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise NoFiles(NEEDS) from None
    try:
        there = pq.read_schema(path).names
        table = pq.read_table(path, columns=[name for name in columns if name in there] if columns else None)
        rows: list[Raw] = table.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise NoFiles(f"{path}: no samples of a step: {error}") from None
    return rows


# attempts, take-overs, checkpoints


def attempts(run: Run) -> list[Attempt]:
    """Oldest first."""
    folder = run.root / "logs"
    there = [(int(match[1]), path) for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := ATTEMPT.fullmatch(path.name))]
    return [Attempt(number, _log(path)) for number, path in sorted(there)]


def _log(folder: Path) -> str:
    parts = sorted(path for path in folder.iterdir() if path.suffix == ".log")
    text, last = "", -1
    for path in parts:
        number = int(path.stem) if path.stem.isdigit() else last + 1
        text += f"\n({number - last - 1} parts were dropped here)\n" if last >= 0 and number > last + 1 else ""
        text += path.read_text(errors="replace")
        last = number
    return text


def turns(run: Run) -> list[Raw]:
    """Who took the path over, and when, oldest first."""
    folder, found = run.root / "fence", list[Raw]()
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            read = json.loads(path.read_text())
            found += [one for one in (read if isinstance(read, list) else [read]) if isinstance(one, dict)]
        except (OSError, ValueError) as error:
            run.miss(path, error)
    return sorted(found, key=lambda one: one.get("number", 0))


def checkpoints(run: Run) -> tuple[list[Checkpoint], Raw]:
    """Whole ones, oldest first, and what the newest says of the model."""
    found, model = list[Checkpoint](), dict[str, Any]()
    for path in run.root.iterdir():
        match = CHECKPOINT.fullmatch(path.name)
        if match is None or not (path / RUN).is_file():
            continue
        try:
            content = json.loads((path / RUN).read_text().partition("\n")[0])
            size = sum(entry[0] for entry in content["files"].values())
            found.append(Checkpoint(path.name, int(match[1]), int(match[2] or 0), content["version"], size))
            model = content["model"] if int(match[1]) >= max(one.step for one in found) else model
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            run.miss(path / RUN, error)
    return sorted(found, key=lambda one: (one.step, one.attempt)), model
