"""Checkpoints: `<path>/step-<n>.<writer>/<role>/` holds torch DCP's shards of a role's model and optimizer and every
rank's RNG; run.json the rest.

run.json is written last and names every file with its size and CRC32: a directory without it, or with other files, is
no checkpoint. On a mounted volume a directory also gets its name only when it is whole. Tensors are copied to the host
at once and written by a thread.

Of several drivers on one path only the last to take it over publishes (`fence`). Names carry their writer, so no
checkpoint mixes two. """

import io
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem, FsspecReader, FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.optim import Optimizer

from rlhf_api.job import BestSpec
from rlhf_worker.best import ranked
from rlhf_worker.errors import BadData, Call, DeadlineExceeded, Fenced, Verdict, verdict
from rlhf_worker.storage import Store
from rlhf_worker.trainer.fence import Fence, Writer, standing

NAME = re.compile(r"step-(\d+)(?:\.(attempt-\d+-[0-9a-f]{8}))?")  # without a writer: made before there was a fence
STAGED = re.compile(r"\.(?:step-(\d+)|export|export-best)(?:\.(attempt-\d+-[0-9a-f]{8}))?\.(?:partial|replaced)")
RUN, PART, RNG, LATEST = "run.json", "part.json", "rng.pt", "latest"
# Between tries of storage that fails now. All ranks of a group make as many: all of them try a collective again.
PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
POLL_SECONDS = 0.2
PARTIAL = StateDictOptions(strict=False)

T = TypeVar("T")
Roles = Mapping[str, tuple[nn.Module, Optimizer]]
Files = dict[str, list[int]]  # by name inside the checkpoint: size in bytes, CRC32


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Everything of a run besides tensors. `version`: optimizer updates since the base model; `loop`: the loop's own
    memory (KL controller, work in flight).
    """

    step: int
    version: int
    model: dict[str, Any]
    sampler: dict[str, Any]
    loop: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a save ended."""

    step: int
    path: str
    error: str | None


@dataclass(frozen=True, slots=True)
class Restored:
    """`passed_over`: newer checkpoints that are damaged, each by name and fault. `path`: of the one that was read.
    """

    state: RunState | None
    passed_over: list[str]
    path: str = ""


class Saver:
    """One rank's end. `begin`, `restore` and `close` are collectives of the ranks that hold the same roles; the process
    group must be there.

    expected: every role that the run trains, also those of other rank groups; `leads`: this group has the policy.
    driver: the same in all processes of one driver, and in no other. seconds: how long to wait for other groups.
    """

    def __init__(
        self, root: str, keep: int, expected: Sequence[str], driver: str, *, leads: bool, seconds: float,
        best: BestSpec | None = None,
    ) -> None:
        self.store = Store(root)
        self.keep = keep
        self.best = best
        self.expected = expected
        self.driver = driver
        self.leads = leads
        self.seconds = seconds
        self.fenced = Fence(self.store, Writer("", 0, driver))  # until `fence` knows more
        self.refused: Fenced | None = None
        # Of its own: its collectives run beside the loop's, and one rank may write for long.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.running: Future[None] | None = None
        self.outcomes: list[Outcome] = []

    def fence(self, job: str, attempt: int) -> None:
        """Take the path over from every driver before. No collective: the leader's first rank does it, the others
        remember. Raises Fenced.
        """
        self.fenced = Fence(self.store, Writer(job, attempt, self.driver))
        if self._leader:
            self.fenced.take()

    @property
    def _leader(self) -> bool:
        return self.leads and dist.get_rank(self.group) == 0

    def begin(self, state: RunState, roles: Roles) -> None:
        """The tensors are copied when this returns, and written after it. Waits for the save before."""
        mark = self.fenced.writer.mark
        self._wait()
        stager = DefaultStager(StagingOptions(False, False, False, False))
        staged = {role: stager.stage(_tensors(*held)) for role, held in roles.items()}
        stager.close()
        rngs = self._gather(_rng())
        self.running = self.thread.submit(self._save, f"step-{state.step}.{mark}", state, staged, rngs)

    def finished(self, *, wait: bool) -> list[Outcome]:
        """Saves that ended since the last call. Only the leader's and the first ranks of other groups know all. Raises
        Fenced, then and ever after.
        """
        if wait or (self.running and self.running.done()):
            self._wait()
        if self.refused is not None:
            raise self.refused
        ended, self.outcomes = self.outcomes, []
        return ended

    def close(self) -> None:
        self._wait()
        self.thread.shutdown()

    def _wait(self) -> None:
        if self.running is not None:
            self.running.result()
            self.running = None

    def _gather(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def _save(self, target: str, state: RunState, staged: dict[str, Any], rngs: list[Any]) -> None:
        """In the thread. Every rank comes to the end of it whatever fails, for the others wait for it in a collective.
        """
        work = f".{target}.partial" if self.store.local else target
        error = None
        try:
            files = self._write(work, staged)
            if dist.get_rank(self.group) == 0:
                self._finish(state, work, target, list(staged), rngs, files)
        except (Exception, CheckpointException) as caught:  # which is no Exception
            error = _cause(caught)
            if self._leader:
                self.refused = self._why_fenced(caught)
            if dist.get_rank(self.group) == 0:
                error = error if self.refused else f"{error}; {self._room()}"
                self._give_up(work, list(staged), error)
        if self._leader and error is None:
            self._tidy(target, state.step)
        self.outcomes.append(Outcome(step=state.step, path=self.store.url(target), error=error))

    def _why_fenced(self, caught: BaseException) -> Fenced | None:
        """A later driver removes what this one had staged, so any failure may be its doing."""
        if isinstance(caught, Fenced):
            return caught
        try:
            self.fenced.check()
        except Fenced as refused:
            return refused
        except (OSError, BadData):  # of storage that fails anyway
            pass
        return None

    def _write(self, work: str, staged: dict[str, Any]) -> dict[str, Files]:
        """Collective. Of each role, the files of all ranks. Raises CheckpointException on every rank when one fails."""
        written: dict[str, Files] = {}
        for role, tensors in staged.items():
            path = self.store.url(f"{work}/{role}")
            writer, files = FsspecWriter(path, sync_files=self.store.local), SummingFiles()
            files.init_path(path)
            writer.fs = files  # type: ignore[assignment]  # declared narrower than what it uses
            save_tensors(tensors, storage_writer=writer, process_group=self.group)
            written[role] = {name: sums for own in self._gather(files.sums) for name, sums in own.items()}
        return written

    def _finish(
        self, state: RunState, work: str, target: str, roles: list[str], rngs: list[Any], written: dict[str, Files],
    ) -> None:
        """The group's first rank: its parts are told; and the leader, when all parts are, makes the checkpoint."""
        buffer = io.BytesIO()
        torch.save(rngs, buffer)
        written[roles[0]][RNG] = list(self.store.write(f"{work}/{roles[0]}/{RNG}", buffer.getvalue()))
        for role, files in written.items():
            self.store.write(f"{work}/{role}/{PART}", json.dumps({"driver": self.driver, "files": files}).encode())
        if not self.leads:
            return
        files = {
            f"{role}/{name}": sums
            for role in self.expected for name, sums in self._part(f"{work}/{role}/{PART}").items()
        }
        if work == target:  # run.json is what makes it a checkpoint
            self.fenced.check()
        self.store.write(f"{work}/{RUN}", sealed({**asdict(state), "files": files}))
        if work != target:  # its name is
            self.fenced.check()
            self.store.rename(work, target)

    def _tidy(self, target: str, step: int) -> None:
        """After a checkpoint is there, which another driver may have chosen by now: what fails here takes nothing back.
        """
        try:
            self.fenced.check()
            self._point()
            self.fenced.check()
            self._prune(step)
        except Fenced as refused:
            self.refused = refused
        except (OSError, BadData) as error:
            print(
                f"checkpoint: {self.store.url(target)} is whole, but older ones may be left over: {error}", flush=True,
            )

    def _point(self) -> None:
        """`latest` names the newest that counts. Who was overtaken between its look and its write, or had not written
        yet, is put right here.
        """
        named = self._latest()
        while (newest := "".join(self._counting()[-1:])) != named:
            self.store.write(LATEST, newest.encode()) if newest else self.store.remove(LATEST)
            named = newest

    def _latest(self) -> str:
        try:
            return self.store.read(LATEST).decode()
        except FileNotFoundError:
            return ""

    def _part(self, name: str) -> Files:
        """Of a role that other ranks may hold, and still write. Raises TimeoutError, and OSError when they could not.
        """
        end = time.monotonic() + self.seconds
        while True:
            part: dict[str, Any] = {}
            with suppress(FileNotFoundError, ValueError):
                part = json.loads(self.store.read(name))
            if part.get("driver") == self.driver:
                if "error" in part:
                    raise OSError(part["error"])
                return dict(part["files"])
            if time.monotonic() > end:
                raise TimeoutError(f"{name} did not come in {self.seconds:g} s")
            time.sleep(POLL_SECONDS)

    def _prune(self, step: int) -> None:
        """All but the best and the newest `keep` that count, and what earlier saves and earlier drivers left undone.

        Nothing of a later driver's, which may have come by now.
        """
        kept, ours = self._counting()[-self.keep :], {None, self.fenced.writer.mark, *self.fenced.earlier()}
        kept += self._ranked()[:1]
        for name in self.store.names():
            match = NAME.fullmatch(name) or STAGED.fullmatch(name)
            if match and name not in kept and match[2] in ours and int(match[1] or 0) < step:
                self.store.remove(f"{name}/{RUN}")  # first: what is half removed is no checkpoint
                self.store.remove(name)

    def _counting(self) -> list[str]:
        """Whole checkpoints, oldest first, without those that an earlier driver published beyond the one that a later
        driver went on from.
        """
        return standing(
            [(name, int(match[1]), match[2]) for name in whole(self.store) if (match := NAME.fullmatch(name))],
            self.fenced.line()
        )

    def _give_up(self, work: str, roles: list[str], why: str) -> None:
        """What is half-written holds space that the next save needs; and the leader must not wait for a part that will
        not come. All of it is this driver's own.
        """
        try:
            for left in [work] if self.leads else [f"{work}/{role}" for role in roles]:
                self.store.remove(left)
            if not self.leads:
                self.store.write(
                    f"{work}/{roles[0]}/{PART}", json.dumps({"driver": self.driver, "error": why}).encode(),
                )
        except OSError as error:
            print(f"checkpoint: {self.store.url(work)} could not be removed: {error}", flush=True)

    @contextmanager
    def publishing(self, name: str, telling: str) -> Iterator[Path]:
        """The leader's first rank: as the store's, for a writer who is not fenced when the block begins, and whenever
        it publishes. Raises Fenced.
        """
        self.fenced.check()
        earlier = self.fenced.earlier()
        for left in self.store.names():
            if left.startswith(f".{name}.") and (match := STAGED.fullmatch(left)) and match[2] in earlier:
                self.store.remove(left)
        try:
            with self.store.publishing(name, telling, self.fenced.writer.mark, self.fenced.check) as folder:
                yield folder
        except OSError as error:
            raise self._why_fenced(error) or error from None

    def _room(self) -> str:
        """torch tells of a full disk as of a file's position that is not the expected one."""
        room, where = self.store.room(), f"spec.checkpoint.path ({self.store.root})"
        if room is None:
            return f"{where} is remote"
        left = f"{room[0] / 2**30:.1f} GiB free of {room[1] / 2**30:.1f}"
        if room[0] > room[1] / 50:
            return f"{where} has {left}"
        return f"{where} is full ({left}): free space, lower spec.checkpoint.keep or use a larger volume"

    def restore(self, model: dict[str, Any], roles: Roles) -> Restored:
        """The newest whole checkpoint into `roles`, the same in every group.

        Raises BadData for one of another model, and when every one is damaged; Fenced; OSError while storage does not
        give what it may hold: that is no damage, and another start may find it.
        """
        passed_over: list[str] = []
        for name, data in self._agreed(self._offered):
            state, files = read_run(data)
            faults = [state] if isinstance(state, str) else self._faults(name, files) if self.leads else []
            if not faults:
                assert isinstance(state, RunState)
                self._require(name, state, model)
                self._choose(name)
                self._load(name, roles)
                return Restored(state, passed_over, self.store.url(name))
            passed_over.append(f"checkpoint {self.store.url(name)} is damaged ({faults[0]}) and was passed over")
        if passed_over:
            raise BadData(f"{'; '.join(passed_over)}; no whole one is left: set spec.checkpoint.path to an empty "
                "directory to start anew")
        self._choose("")
        return Restored(None, [])

    def _offered(self) -> list[tuple[str, bytes]]:
        """To choose from, newest first, each with run.json; other groups take what the leader's chose."""
        if self.leads:
            return self._candidates()
        name = self.fenced.resumed(self.seconds)
        return [(name, self.store.read(f"{name}/{RUN}"))] if name else []

    def _choose(self, name: str) -> None:
        def resume() -> None:
            self.fenced.resume(name)
            self._point()  # the one before may have ended between a checkpoint and this

        if self.leads:
            self._agreed(resume)

    def _ranked(self) -> list[str]:
        """Whole checkpoints of steps that have the metric of spec.checkpoint.best, the best first."""
        if self.best is None:
            return []
        states = ((name, read_run(data)[0]) for name, data in reversed(self._candidates()))
        return ranked(self.best, {name: state.loop for name, state in states if isinstance(state, RunState)})

    def load_best(self, module: nn.Module) -> str:
        """The policy of the best whole checkpoint into `module`; its name, "" where there is none. Raises BadData."""
        for name, data in self._agreed(lambda: [(one, self.store.read(f"{one}/{RUN}")) for one in self._ranked()]):
            policys = {file: sums for file, sums in read_run(data)[1].items() if file.startswith("policy/")}
            if faults := self._faults(name, policys):
                print(f"checkpoint {self.store.url(name)} is damaged ({faults[0]}) and was passed over", flush=True)
                continue
            tensors = {"model": _weights(module)}
            self._read(name, "policy", tensors)
            set_model_state_dict(module, tensors["model"], options=PARTIAL)
            return str(name)
        return ""

    def _candidates(self) -> list[tuple[str, bytes]]:
        """Newest first, with run.json. An earlier driver may still prune."""
        candidates = []
        for name in reversed(self._counting()):
            with suppress(FileNotFoundError):
                candidates.append((name, self.store.read(f"{name}/{RUN}")))
        return candidates

    def _agreed(self, look: Callable[[], Any]) -> Any:
        """What the group's first rank sees at last: all ranks must choose the same. Raises what it raised, on all of
        them.
        """
        answer: list[Any] = [None]
        if dist.get_rank(self.group) == 0:
            try:
                answer = [persevering(look)]
            except (OSError, BadData, DeadlineExceeded, Fenced) as error:
                answer = [error]
        dist.broadcast_object_list(answer, group_src=0, group=self.group)
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def _faults(self, name: str, files: Files) -> list[str]:
        """Files that are not as they were written; each rank reads its share of them."""
        own = sorted(files)[dist.get_rank(self.group) :: dist.get_world_size(self.group)]
        found: list[str | OSError] = []
        try:
            found += [fault for file in own if (fault := _fault(self.store, f"{name}/{file}", *files[file]))]
        except OSError as error:  # for all ranks: the others wait for what this one saw
            found = [error]
        faults = [fault for part in self._gather(found) for fault in part]
        if unread := next((fault for fault in faults if isinstance(fault, OSError)), None):
            raise unread
        return faults

    def _require(self, name: str, state: RunState, model: dict[str, Any]) -> None:
        if differ := [key for key in model if state.model.get(key) != model[key]]:
            words = ", ".join(f"{key} {state.model.get(key)!r} there, {model[key]!r} here" for key in differ)
            raise BadData(f"checkpoint {self.store.url(name)} is of another model ({words}): set spec.checkpoint.path "
                "to an empty directory, or spec.model to that model")

    def _load(self, name: str, roles: Roles) -> None:
        for role, (module, optimizer) in roles.items():
            tensors = _tensors(module, optimizer)
            # Groups, and their rates and decays, are the spec's, which may be another than the checkpoint's.
            groups = tensors["optimizer"].pop("param_groups")
            self._read(name, role, tensors)
            optim = {**tensors["optimizer"], "param_groups": groups}
            model = tensors["model"]
            set_state_dict(module, optimizer, model_state_dict=model, optim_state_dict=optim, options=PARTIAL)
        self._load_rng(f"{name}/{next(iter(roles))}/{RNG}")

    def _read(self, name: str, role: str, tensors: dict[str, Any]) -> None:
        path = self.store.url(name)
        reader = partial(FsspecReader, f"{path}/{role}")
        try:
            persevering(lambda: load_tensors(tensors, storage_reader=reader(), process_group=self.group))
        except (OSError, RuntimeError, ValueError, CheckpointException) as error:
            if Verdict.DATA not in _verdicts(error):
                raise OSError(f"checkpoint {path} could not be read: {_cause(error)}") from error
            raise BadData(
                f"checkpoint {path} does not fit {role} ({_cause(error)}): set spec.checkpoint.path to an empty "
                "directory, or the spec to what made it"
            ) from error

    def _load_rng(self, name: str) -> None:
        """Only of as many ranks: with another number every rank's stream is another anyway."""
        written = self.store.fs.exists(self.store.path(name))
        rngs = torch.load(io.BytesIO(persevering(partial(self.store.read, name))), weights_only=True) if written else []
        if len(rngs) == dist.get_world_size(self.group):
            own = rngs[dist.get_rank(self.group)]
            torch.set_rng_state(own["cpu"])
            if "cuda" in own and torch.cuda.is_available():
                torch.cuda.set_rng_state(own["cuda"])


def whole(store: Store) -> list[str]:
    """Names of the finished checkpoints, whoever made them, oldest first."""
    steps = [
        (int(match[1]), name) for name in store.names() if (match := NAME.fullmatch(name)) and RUN in store.names(name)
    ]
    return [name for _, name in sorted(steps)]


def sealed(content: dict[str, Any]) -> bytes:
    """run.json with a CRC32 of itself in the last line."""
    text = json.dumps(content).encode()
    return text + f"\n{zlib.crc32(text)}\n".encode()


def read_run(data: bytes) -> tuple[RunState | str, Files]:
    """What run.json says; or its fault in words."""
    text, _, seal = data.rstrip(b"\n").rpartition(b"\n")
    if seal != str(zlib.crc32(text)).encode():
        return f"{RUN} is not as it was written", {}
    content = json.loads(text)
    files = content.pop("files")
    if content.keys() != {field.name for field in fields(RunState)}:
        return f"{RUN} is another version's", {}
    return RunState(**content), files


def _fault(store: Store, name: str, size: int, crc: int) -> str:
    """In words; "" for a file that is as it was written. Raises OSError for one that cannot be read."""
    try:
        measured = persevering(partial(store.measure, name))
    except OSError as error:
        if verdict(Call.CHECKPOINT, error) is not Verdict.DATA:
            raise
        return f"{name}: {error}"
    if measured[0] != size:
        return f"{name} has {measured[0]} bytes of {size}"
    return "" if measured[1] == crc else f"the checksum of {name} differs"


def persevering(look: Callable[[], T]) -> T:
    """Storage that does not answer may in a moment. Raises what it raises still, after a minute."""
    for pause in PAUSES_SECONDS:
        try:
            return look()
        except (OSError, CheckpointException) as error:
            if _verdicts(error) != {Verdict.AGAIN}:
                raise
            print(f"checkpoint: trying again in {pause:g} s: {_cause(error)}", flush=True)
        time.sleep(pause)
    return look()


def _verdicts(error: BaseException) -> set[Verdict]:
    """DCP hides what happened behind what it did, of every rank."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    return {verdict(Call.CHECKPOINT, cause) for cause, _ in failures.values()} or {verdict(Call.CHECKPOINT, error)}


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    return f"{type(error).__name__}: {error}"


def _tensors(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return {"model": _weights(module), "optimizer": get_optimizer_state_dict(module, optimizer)}


def _weights(module: nn.Module) -> dict[str, Any]:
    """Without what adapters leave frozen, which comes from the model's own files; a tied weight has two names."""
    named = module.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    return {name: tensor for name, tensor in get_model_state_dict(module).items() if name not in frozen}


def _rng() -> dict[str, torch.Tensor]:
    return {"cpu": torch.get_rng_state(), **({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})}


class SummingFiles(FileSystem):
    """DCP's way to a filesystem, which also notes size and CRC32 of each file that goes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: Files = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            summed = _Summed(stream)
            yield summed
        # DCP renames its own when they are whole
        self.sums[os.fspath(path).rpartition("/")[2].removesuffix(".tmp")] = [summed.size, summed.crc]


class _Summed:
    """A file for writing from front to back."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.size = self.crc = 0

    def write(self, data: Any) -> int:
        count = self.file.write(data)
        self.size, self.crc = self.size + memoryview(data).nbytes, zlib.crc32(data, self.crc)
        return int(count)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)
