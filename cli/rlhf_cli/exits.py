"""Exit codes, and the one edge at which an error becomes words and a code. docs/cli.md has the table."""

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from enum import IntEnum
from typing import Any, NoReturn, TypeVar

from rlhf_client.errors import (
    AlreadyThere,
    ClientError,
    Gone,
    JobFailed,
    NoConnection,
    NotAllowed,
    NotFound,
    NotInstalled,
    OtherVersion,
    Refused,
    TimedOut,
)

T = TypeVar("T")


class Exit(IntEnum):
    OK = 0
    FAILED = 1  # the job failed
    USAGE = 2  # a wrong option, value or manifest
    NO_CONNECTION = 3
    NOT_ALLOWED = 4
    NOT_FOUND = 5
    OTHER_VERSION = 6  # the cluster lacks RLHFJobs, or knows other fields
    TIMED_OUT = 7
    FILES = 8  # the files of a run cannot be had or read
    INTERRUPTED = 130


CODES: dict[type[ClientError], Exit] = {
    NoConnection: Exit.NO_CONNECTION, NotAllowed: Exit.NOT_ALLOWED, NotFound: Exit.NOT_FOUND, Gone: Exit.NOT_FOUND,
    NotInstalled: Exit.OTHER_VERSION, OtherVersion: Exit.OTHER_VERSION, TimedOut: Exit.TIMED_OUT,
    Refused: Exit.USAGE, AlreadyThere: Exit.USAGE, JobFailed: Exit.FAILED,
}  # fmt: skip


class Wrong(Exception):
    """What the user gave is wrong. The message names it and the fix."""


class NoFiles(Exception):
    """The files of a run are not there, or cannot be read. The message names the place and the fix."""


def fail(code: Exit, message: str) -> NoReturn:
    """Tell it on standard error, and end."""
    end(code, message if message.startswith("error") else f"error: {message}")


def end(code: Exit, message: str) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(int(code))


def guarded(work: Callable[[], T]) -> T:
    """Run it, and turn each error that a user can do something about into its words and exit code."""
    try:
        return work()
    except Wrong as error:
        fail(Exit.USAGE, str(error))
    except NoFiles as error:
        fail(Exit.FILES, str(error))
    except ClientError as error:
        fail(CODES[type(error)], str(error))
    except BrokenPipeError:  # whoever read has enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(int(Exit.OK)) from None


def run(work: Coroutine[Any, Any, T]) -> T:
    """The same of a coroutine."""
    return guarded(lambda: asyncio.run(work))
