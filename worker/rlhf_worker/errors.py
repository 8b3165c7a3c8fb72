"""How a run ends when its input is wrong, the failures that are retried in place, and which library errors are which.

`TABLE` is the one place that says what an error of a library that reads a user's files means; `explained` applies it.
"""

import errno
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")

PART_CHARACTERS = 700  # of what a library says; some list every class that they know


class BadSpec(Exception):
    """The spec is wrong (exit 64, never retried). The message names the field and the fix."""


class BadData(Exception):
    """Data or a checkpoint is wrong (exit 65, never retried). The message names the place and the fix."""


class Passing(Exception):
    """Something outside the run, such as a model hub or a volume, did not do its part: the next try may do."""


class NotNumbered(Exception):
    """The operator gave this driver's pod no number, without which it must not write."""


class PortTaken(Exception):
    """Where pods that are being deleted tell the driver, something else listens."""


class PreflightFailed(Exception):
    """A check before the first step failed, and another try may find it mended."""


class DownloadFailed(Exception):
    """The hub, or the way to it, gave nothing for too long. What came is kept, and gone on from."""


class PlacementFailed(Exception):
    """Ray lacks what the placement asks for, or roles sit on other GPUs than planned."""


class DeadlineExceeded(Exception):
    """A call into the cluster did not come back in the time that the spec gives it."""


class SyncMismatch(Exception):
    """The engines do not hold the trainer's weights after a sync."""


class Diverged(Exception):
    """Loss or gradient is not finite. The message says where the batch was dumped."""


class SaveFailed(Exception):
    """The run's last checkpoint could not be written. The message names path, room and fix."""


class Fenced(Exception):
    """A later driver writes this checkpoint path: this one publishes nothing any more, and has nothing left to do."""


class EngineFailed(Exception):
    """vLLM did not start, or its processes ended. The message holds the end of their log."""


class ActorLost(Exception):
    """An actor died that the run cannot do without. The message names it, its pod and process, and how it ended."""


class EnginesLost(Exception):
    """Too few engines are left to go on, and starting them anew did not help."""


class RewardFailed(Exception):
    """A reward gave no value for a sample, in any of its tries.

    The message names the reward, the prompt and the reward's own error.
    """


class EnvironmentFailed(Exception):
    """An environment gave no answer, in any of an episode's tries.

    The message names the prompt and the environment's own error.
    """


class LinkBroken(Exception):
    """A weight sync failed between its ranks: one of them died, or its link did. What they hold is not a version."""


class Call(StrEnum):
    """Of a library, on what a user brought: the words by which the message goes on after field and place."""

    CONFIG = "transformers cannot read its config"
    TOKENIZER = "transformers cannot read its tokenizer"
    MODEL = "transformers cannot make this model of its config"
    WEIGHTS = "its weights cannot be loaded"
    EXPORT = "transformers cannot write it again, which an export does"
    ENGINE = "vLLM refuses it"


class Verdict(StrEnum):
    """What an error of a call means."""

    SPEC = "the user's: the spec names something else, or its files are mended"
    AGAIN = "nobody's: the next try may do"
    OURS = "a fault of this program, which keeps its traceback"


@dataclass(frozen=True, slots=True)
class Row:
    """`error`: of its package, `package.Class`, or a builtin; a class stands for those that are made of it."""

    error: str
    calls: frozenset[Call]
    verdict: Verdict


CHECKPOINT = frozenset({Call.CONFIG, Call.TOKENIZER, Call.MODEL, Call.WEIGHTS, Call.EXPORT})
EVERY = frozenset(Call)
TABLE = (
    # Of what lies behind the error too: libraries wrap these in their own.
    Row("ConnectionError", EVERY, Verdict.AGAIN),
    Row("TimeoutError", EVERY, Verdict.AGAIN),
    Row("socket.gaierror", EVERY, Verdict.AGAIN),
    Row("httpx.TransportError", EVERY, Verdict.AGAIN),
    Row("requests.ConnectionError", EVERY, Verdict.AGAIN),
    Row("requests.Timeout", EVERY, Verdict.AGAIN),
    Row("urllib3.HTTPError", EVERY, Verdict.AGAIN),
    Row("MemoryError", EVERY, Verdict.AGAIN),
    Row("torch.OutOfMemoryError", EVERY, Verdict.AGAIN),
    # Of the error itself.
    Row("OSError", CHECKPOINT, Verdict.SPEC),
    Row("ValueError", EVERY, Verdict.SPEC),
    Row("KeyError", EVERY, Verdict.SPEC),
    Row("TypeError", EVERY, Verdict.SPEC),
    Row("AttributeError", CHECKPOINT, Verdict.SPEC),
    Row("ImportError", EVERY, Verdict.SPEC),
    Row("AssertionError", EVERY, Verdict.SPEC),
    Row("NotImplementedError", EVERY, Verdict.SPEC),
    Row("IndexError", CHECKPOINT, Verdict.SPEC),
    Row("ZeroDivisionError", CHECKPOINT, Verdict.SPEC),
    Row("SyntaxError", CHECKPOINT, Verdict.SPEC),  # of code that comes with a checkpoint
    Row("huggingface_hub.StrictDataclassError", CHECKPOINT, Verdict.SPEC),
    Row("Exception", frozenset({Call.TOKENIZER}), Verdict.SPEC),  # tokenizers raises nothing better; itself alone
    Row("safetensors.SafetensorError", frozenset({Call.WEIGHTS}), Verdict.SPEC),
    Row("pickle.UnpicklingError", frozenset({Call.WEIGHTS}), Verdict.SPEC),
    Row("EOFError", frozenset({Call.WEIGHTS}), Verdict.SPEC),
    Row("RuntimeError", frozenset({Call.WEIGHTS, Call.MODEL}), Verdict.SPEC),  # of shapes, and torch's of its files
)
OFFLINE = "huggingface_hub.OfflineModeIsEnabled"  # a ConnectionError that no waiting mends
AGAIN_CODES = frozenset({408, 425, 429, *range(500, 600)})
AGAIN_ERRNO = frozenset({
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EAGAIN, errno.EINTR, errno.EMFILE, errno.ENFILE,
    errno.ENOSPC, errno.ENOMEM, errno.EBUSY, errno.EREMOTEIO, errno.ENETUNREACH, errno.EHOSTUNREACH,
})  # fmt: skip
AGAIN_WORDS = re.compile(
    r"cannot allocate memory|out of memory|input/output error|stale file handle|CUDA error|NCCL", re.IGNORECASE
)


def verdict(call: Call, error: BaseException) -> Verdict:
    """Pure: from the error and what lies behind it."""
    links = list(_chain(error))
    if not any(OFFLINE in _names(link) for link in links) and any(_passes(call, link) for link in links):
        return Verdict.AGAIN
    return next((row.verdict for row in TABLE if call in row.calls and row.error in _names(error)), Verdict.OURS)


def _passes(call: Call, link: BaseException) -> bool:
    code = getattr(getattr(link, "response", None), "status_code", None)
    if code in AGAIN_CODES or (isinstance(link, OSError) and link.errno in AGAIN_ERRNO):
        return True
    if isinstance(link, RuntimeError) and AGAIN_WORDS.search(str(link)):
        return True
    rows = (row for row in TABLE if row.verdict is Verdict.AGAIN and call in row.calls)
    return bool(_names(link) & {row.error for row in rows})


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _names(error: BaseException) -> set[str]:
    """As `TABLE` writes them: by the package that has the class, whatever its module and its major version are."""
    kinds = [kind for kind in type(error).__mro__ if kind not in (Exception, BaseException, object)] or [type(error)]
    return {f"{_package(kind)}{kind.__name__}" for kind in kinds}


def _package(kind: type) -> str:
    name = kind.__module__.partition(".")[0].lstrip("_")
    return "" if name == "builtins" else f"{name if name == 'urllib3' else name.rstrip('0123456789')}."


@contextmanager
def explained(call: Call, where: str) -> Iterator[None]:
    """where: field and value, or file. Raises BadSpec or Passing for what `TABLE` knows, else the error as it is."""
    try:
        yield
    except (BadSpec, BadData):
        raise
    except Exception as error:
        words = f"{where}: {call}: {said(error)[:PART_CHARACTERS]}"
        match verdict(call, error):
            case Verdict.SPEC:
                raise BadSpec(words) from error
            case Verdict.AGAIN:
                raise Passing(words) from error
        raise


def said(error: BaseException) -> str:
    """Class and message, also of an error that fails when it is printed."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception as failure:
        return f"{type(error).__name__} (its message cannot be printed: {type(failure).__name__})"


class Problems:
    """Errors, collected: what runs under `with problems:` may fail, and the code after it goes on."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self.errors.append(error)
        return True

    def tell(self) -> None:
        """Raises what `combined` makes of them, if there are any."""
        if self.errors:
            raise combined(self.errors)


def together(steps: Iterable[Callable[[], T]]) -> list[T]:
    """What each gives. Raises what `Problems` tells of those that fail."""
    results, problems = list[T](), Problems()
    for step in steps:
        with problems:
            results.append(step())
    problems.tell()
    return results


def combined(errors: Iterable[BaseException]) -> BaseException:
    """One error for all, of the hardest kind: BadSpec over BadData over what is tried again. Same words are one."""
    every = [part for error in errors for part in getattr(error, "parts", (error,))]
    parts: dict[str, BaseException] = {said(part): part for part in every}
    if len(parts) == 1:
        return next(iter(parts.values()))
    hardest_first = sorted(parts, key=lambda text: _hardness(parts[text]))
    kind = (BadSpec, BadData, PreflightFailed)[_hardness(parts[hardest_first[0]])]
    lines = (f"{number}. {text[:PART_CHARACTERS]}" for number, text in enumerate(hardest_first, 1))
    whole = kind(f"{len(parts)} things are wrong:\n" + "\n".join(lines))
    # Errors of libraries need not survive a pickle.
    own = tuple(part if type(part).__module__ == __name__ else PreflightFailed(text) for text, part in parts.items())
    whole.__dict__["parts"] = own
    return whole


def _hardness(error: BaseException) -> int:
    return 0 if isinstance(error, BadSpec) else 1 if isinstance(error, BadData) else 2
