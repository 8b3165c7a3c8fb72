"""Which errors of libraries mean what, a test a row of the table; and how several become one."""

import builtins
import errno
import io
import pickle
import socket
from collections.abc import Callable
from typing import Any

import httpx
import httpx2
import huggingface_hub.errors as hub
import pytest
import requests
import tokenizers
import torch
import urllib3
from safetensors.torch import load as load_safetensors

from rlhf_worker.errors import (
    TABLE,
    BadData,
    BadSpec,
    Call,
    Meaning,
    Passing,
    PreflightFailed,
    Problems,
    Verdict,
    combined,
    explained,
    said,
    together,
    verdict,
)


def raised(work: Callable[[], Any]) -> Exception:
    """What a library really raises."""
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError("it raised nothing")


def of_class(name: str) -> Exception:
    """An error of every class that the table names, by a library where that is easy."""
    ways: dict[str, Callable[[], Any]] = {
        "huggingface_hub.StrictDataclassError": _strict,
        "Exception": lambda: tokenizers.Tokenizer.from_str("{}"),
        "safetensors.SafetensorError": lambda: load_safetensors(b"version https://git-lfs"),
        "pickle.UnpicklingError": lambda: torch.load(io.BytesIO(b"not a pickle at all"), weights_only=True),
        "EOFError": lambda: torch.load(io.BytesIO(b""), weights_only=True),
    }
    direct: dict[str, Exception] = {
        "socket.gaierror": socket.gaierror(-2, "Name or service not known"),
        "httpx.TransportError": httpx.ConnectError("no"),
        "requests.ConnectionError": requests.ConnectionError("no"),
        "requests.Timeout": requests.Timeout("no"),
        "urllib3.HTTPError": urllib3.exceptions.ProtocolError("cut"),
        "torch.OutOfMemoryError": torch.OutOfMemoryError("no"),
        "huggingface_hub.OfflineModeIsEnabled": hub.OfflineModeIsEnabled("no"),
        "huggingface_hub.HFValidationError": hub.HFValidationError("no"),
        "any": StopIteration("no"),
    }
    kind, _, rest = name.partition(".")
    if kind == "errno":
        return OSError(getattr(errno, rest), "words")
    if kind == "http":
        return answered({"4xx": 404, "5xx": 503}.get(rest) or int(rest))
    if name in ways:
        return raised(ways[name])
    error: Exception = direct[name] if name in direct else getattr(builtins, name)("words")
    return error


def _strict() -> None:
    raise hub.StrictDataclassFieldValidationError("rms_norm_eps", TypeError("expected float, got str"))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.error} {row.verdict.name}")
def test_every_row_of_the_table(row: Meaning) -> None:
    error = of_class(row.error)
    assert {verdict(call, error) for call in row.calls} == {row.verdict}
    kinds: dict[Verdict, type[Exception]] = {Verdict.SPEC: BadSpec, Verdict.DATA: BadData, Verdict.AGAIN: Passing}
    for call in row.calls:
        with pytest.raises(kinds.get(row.verdict, type(error))) as told, explained(call, "spec.x: /m"):
            raise error
        said_so = f"spec.x: /m: {call}: {type(error).__name__}: "
        assert (told.value is error) if row.verdict is Verdict.OURS else str(told.value).startswith(said_so)


def test_no_row_is_hidden_by_those_before_it() -> None:
    for row in TABLE:
        assert row in {next(o for o in TABLE if call in o.calls and o.error == row.error) for call in row.calls}, row


@pytest.mark.parametrize("error", [LookupError("x"), StopIteration("x"), FloatingPointError("x")])
def test_what_no_row_knows_is_our_own_and_keeps_its_traceback(error: Exception) -> None:
    for call in set(Call) - {Call.DATASET, Call.CHECKPOINT, Call.ROW}:
        assert verdict(call, error) is Verdict.OURS
        with pytest.raises(type(error)) as told, explained(call, "spec.x: /m"):
            raise error
        assert told.value is error
    assert verdict(Call.CONFIG, RuntimeError("x")) is Verdict.OURS


def behind(outer: Exception, cause: Exception) -> Exception:
    outer.__cause__ = cause
    return outer


def answered(code: int) -> hub.HfHubHTTPError:
    request = httpx2.Request("GET", "http://hub/a")
    return hub.HfHubHTTPError("no", response=httpx2.Response(code, request=request))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            behind(OSError("We couldn't connect"), behind(hub.LocalEntryNotFoundError("no"), httpx.ConnectError("x"))),
            Verdict.AGAIN,
        ),
        (
            behind(ValueError("no tokenizer"), behind(OSError("Can't load"), httpx.RemoteProtocolError("cut"))),
            Verdict.AGAIN,
        ),
        *((behind(OSError("no"), answered(code)), Verdict.AGAIN) for code in (408, 429, 500, 503)),
        *((behind(OSError("no"), answered(code)), Verdict.SPEC) for code in (401, 403, 404)),
        (
            behind(OSError("no"), behind(hub.LocalEntryNotFoundError("no"), hub.OfflineModeIsEnabled("offline"))),
            Verdict.SPEC,
        ),
        *((OSError(code, "words"), Verdict.AGAIN) for code in (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENOSPC)),
        *((OSError(code, "words"), Verdict.SPEC) for code in (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.EINVAL)),
        (RuntimeError("size mismatch for embed_tokens"), Verdict.SPEC),
        (RuntimeError("unable to mmap 12 bytes: Cannot allocate memory (12)"), Verdict.AGAIN),
        (RuntimeError("CUDA error: an illegal memory access"), Verdict.AGAIN),
    ],
)
def test_what_lies_behind_an_error_counts(error: Exception, expected: Verdict) -> None:
    assert verdict(Call.WEIGHTS, error) is expected


def test_a_long_message_is_cut_and_wrong_input_passes_through() -> None:
    with pytest.raises(BadSpec) as told, explained(Call.MODEL, "spec.x"):
        raise ValueError("v" * 5000)
    assert len(str(told.value)) < 900
    for error in (BadSpec("spec.a"), BadData("line 1")):
        with pytest.raises(type(error)) as same, explained(Call.CONFIG, "spec.x"):
            raise error
        assert same.value is error


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_an_error_that_cannot_be_printed_has_words() -> None:
    assert said(Mute()) == "Mute (its message cannot be printed: RuntimeError)"


@pytest.mark.parametrize(
    ("errors", "kind"),
    [
        ([BadData("d"), BadSpec("s"), OSError("o")], BadSpec),
        ([OSError("o"), BadData("d")], BadData),
        ([OSError("o"), PreflightFailed("p")], PreflightFailed),
    ],
)
def test_the_hardest_gives_the_kind_and_comes_first(errors: list[Exception], kind: type[Exception]) -> None:
    whole = combined(errors)
    assert type(whole) is kind
    first, *lines = str(whole).splitlines()
    assert first == f"{len(errors)} things are wrong:"
    hardest = sorted(errors, key=lambda error: (not isinstance(error, BadSpec), not isinstance(error, BadData)))
    assert lines == [f"{number}. {said(error)}" for number, error in enumerate(hardest, 1)]


def test_the_same_words_are_told_once_and_parts_survive_a_pickle() -> None:
    assert combined([BadSpec("s"), BadSpec("s")]).args == ("s",)
    inner = pickle.loads(pickle.dumps(combined([BadSpec("a"), BadData("b"), answered(404)])))
    assert str(combined([inner, BadSpec("a"), BadSpec("c")])).splitlines() == [
        "4 things are wrong:",
        "1. BadSpec: a",
        "2. BadSpec: c",
        "3. BadData: b",
        "4. PreflightFailed: HfHubHTTPError: no",
    ]


def test_what_runs_after_a_problem_runs() -> None:
    problems = Problems()
    problems.tell()
    with problems:
        raise BadSpec("s")
    with problems:
        reached = True
    assert reached
    with pytest.raises(KeyboardInterrupt), problems:
        raise KeyboardInterrupt
    with pytest.raises(BadSpec, match=r"^s$"):
        problems.tell()
    assert together([lambda: 1, lambda: 2]) == [1, 2]
    with pytest.raises(BadData, match=r"(?s)2 things are wrong:.*BadData: line 1.*ValueError: v"):
        together([lambda: 1, lambda: _raise(ValueError("v")), lambda: _raise(BadData("line 1"))])


def _raise(error: Exception) -> int:
    raise error
