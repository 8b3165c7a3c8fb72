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
    DATASET = "datasets cannot read it"
    ROW = "cannot be read"
    HUB = "the hub does not give it"
    CHECKPOINT = "it is not what a run of this spec saved"


class Verdict(StrEnum):
    """What an error of a call means."""

    SPEC = "the user's: the spec names something else, or its files are mended"
    DATA = "the user's: the data, or a checkpoint, is mended or another"
    AGAIN = "nobody's: the next try may do"
    OURS = "a fault of this program, which keeps its traceback"


@dataclass(frozen=True, slots=True)
class Meaning:
    """`error`: of its package, `package.Class`, or a builtin, where a class stands for those that are made of it; by
    its number, `errno.NAME`; by a server's answer, `http.429` or `http.4xx`; or ANY.
    """

    error: str
    calls: frozenset[Call]
    verdict: Verdict


def _rows(verdict: Verdict, calls: Iterable[Call], *errors: str) -> list[Meaning]:
    return [Meaning(error, frozenset(calls), verdict) for error in errors]


ANY, OFFLINE = "any", "huggingface_hub.OfflineModeIsEnabled"
EVERY = frozenset(Call)
MODEL = frozenset({Call.CONFIG, Call.TOKENIZER, Call.MODEL, Call.WEIGHTS, Call.EXPORT})
LOADED = MODEL | {Call.ENGINE}
READ = frozenset({Call.DATASET, Call.CHECKPOINT})  # of storage
DATA = READ | {Call.ROW}
# The first row that fits an error is its verdict.
TABLE = (
    *_rows(Verdict.SPEC, EVERY - DATA, OFFLINE),  # no waiting mends it
    *_rows(Verdict.DATA, DATA, OFFLINE),
    # A directory that cannot take a download.
    *_rows(Verdict.SPEC, [Call.HUB], "errno.ENOSPC", "errno.EDQUOT", "errno.EACCES", "errno.EPERM", "errno.EROFS"),
    # Of what lies behind an error too: libraries wrap these in their own.
    *_rows(
        Verdict.AGAIN, EVERY, "http.408", "http.425", "http.429", "http.5xx", "errno.EIO", "errno.ESTALE",
        "errno.ETIMEDOUT", "errno.ENOTCONN", "errno.EAGAIN", "errno.EINTR", "errno.EMFILE", "errno.ENFILE",
        "errno.ENOMEM", "errno.EBUSY", "errno.EREMOTEIO", "errno.ENETUNREACH", "errno.EHOSTUNREACH", "ConnectionError",
        "TimeoutError", "socket.gaierror", "httpx.TransportError", "requests.ConnectionError", "requests.Timeout",
        "urllib3.HTTPError", "MemoryError", "torch.OutOfMemoryError",
    ),
    *_rows(Verdict.AGAIN, EVERY - {Call.HUB}, "errno.ENOSPC"),
    # Of the error itself.
    *_rows(
        Verdict.SPEC, LOADED, "ValueError", "KeyError", "TypeError", "ImportError", "AssertionError",
        "NotImplementedError",
    ),
    *_rows(
        Verdict.SPEC, MODEL, "OSError", "AttributeError", "IndexError", "ZeroDivisionError",
        "SyntaxError",  # of code that comes with a checkpoint
        "huggingface_hub.StrictDataclassError",
    ),
    *_rows(Verdict.SPEC, [Call.TOKENIZER], "Exception"),  # tokenizers raises nothing better; itself alone
    *_rows(Verdict.SPEC, [Call.WEIGHTS], "safetensors.SafetensorError", "pickle.UnpicklingError", "EOFError"),
    *_rows(Verdict.SPEC, [Call.WEIGHTS, Call.MODEL], "RuntimeError"),  # of shapes, and torch's of its files
    # The hub's answer, and what a download meets on the way.
    *_rows(Verdict.SPEC, [Call.HUB], "http.4xx", "huggingface_hub.HFValidationError"),
    *_rows(Verdict.AGAIN, [Call.HUB], "OSError"),
    *_rows(Verdict.DATA, [Call.DATASET], "http.4xx"),
    # Storage that has a file tells of the file, any other error of storage.
    *_rows(Verdict.DATA, READ, "FileNotFoundError", "IsADirectoryError", "NotADirectoryError"),
    *_rows(Verdict.DATA, [Call.DATASET], "PermissionError"),
    *_rows(Verdict.OURS, [Call.CHECKPOINT], "PermissionError"),  # nobody's that a minute mends
    *_rows(Verdict.AGAIN, READ, "OSError"),
    # A column that does not decode, or needs a package that the image lacks.
    *_rows(Verdict.DATA, [Call.ROW], "ValueError", "TypeError", "LookupError", "ImportError", "RuntimeError"),
    *_rows(Verdict.DATA, READ, ANY),  # every reader of every format there is has errors of its own
)
AGAIN_WORDS = re.compile(
    r"cannot allocate memory|out of memory|input/output error|stale file handle|CUDA error|NCCL", re.IGNORECASE
)


def verdict(call: Call, error: BaseException) -> Verdict:
    """Pure: from the error and what lies behind it."""
    links = list(_chain(error))
    offline = any(OFFLINE in _names(link) for link in links)
    if not offline and any(_alone(call, link) is Verdict.AGAIN for link in links):
        return Verdict.AGAIN
    return _alone(call, error)


def _alone(call: Call, error: BaseException) -> Verdict:
    if isinstance(error, RuntimeError) and AGAIN_WORDS.search(str(error)):
        return Verdict.AGAIN
    names = {ANY, *_names(error)}
    return next((row.verdict for row in TABLE if call in row.calls and row.error in names), Verdict.OURS)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _names(error: BaseException) -> set[str]:
    """As `TABLE` writes them: by the package that has the class, whatever its module and its major version are."""
    kinds = [kind for kind in type(error).__mro__ if kind not in (Exception, BaseException, object)] or [type(error)]
    names = {f"{_package(kind)}{kind.__name__}" for kind in kinds}
    if isinstance(error, OSError) and error.errno is not None and error.errno in errno.errorcode:
        names.add(f"errno.{errno.errorcode[error.errno]}")
    if isinstance(code := getattr(getattr(error, "response", None), "status_code", None), int):
        names |= {f"http.{code}", f"http.{code // 100}xx"}
    return names


def _package(kind: type) -> str:
    name = kind.__module__.partition(".")[0].lstrip("_")
    return "" if name == "builtins" else f"{name if name == 'urllib3' else name.rstrip('0123456789')}."


@contextmanager
def explained(call: Call, where: str) -> Iterator[None]:
    """where: field and value, or file. Raises BadSpec, BadData or Passing for what `TABLE` knows, else the error as it
    is.
    """
    try:
        yield
    except (BadSpec, BadData):
        raise
    except Exception as error:
        words = f"{where}: {call}: {said(error)[:PART_CHARACTERS]}"
        match verdict(call, error):
            case Verdict.SPEC:
                raise BadSpec(words) from error
            case Verdict.DATA:
                raise BadData(words) from error
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
