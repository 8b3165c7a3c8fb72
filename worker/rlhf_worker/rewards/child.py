"""A subprocess that calls one reward function, or holds episodes of one environment.

`python -m rlhf_worker.rewards.child FD`, FD one end of a socket pair. The parent sends pickles (first what to load,
then the arguments of one call each) and gets one line of JSON for each: {"value": ...} or {"error": text}. A reward's
value is [[number, {metric: number}], ...], one a completion. What the function prints goes to standard error. When the
parent is gone, so is the child, also in the middle of a call.
"""

import importlib
import json
import linecache
import numbers
import os
import pickle
import queue
import socket
import sys
import threading
import traceback
import types
from collections.abc import Callable
from functools import partial
from typing import Any

ERROR_LIMIT = 2000  # characters of a traceback's tail

Function = Callable[..., Any]


def load(function: str | None, code: str | None, field: str, kind: str, name: str) -> Function:
    """What a spec's `field` names: the `kind` at `module:kind`, or the `name` that `code` defines. Raises whatever the
    import raises, or LookupError.
    """
    if code is not None:
        return _from_code(code, f"<{field}.code>", kind, name)
    module, _, attribute = (function or "").partition(":")
    found: Function | None = getattr(importlib.import_module(module), attribute, None)
    if not callable(found):
        raise LookupError(f"module {module} has no {kind} {attribute!r}: {field}.function must be module:{kind}")
    return found


def _from_code(code: str, filename: str, kind: str, name: str) -> Function:
    """Of a module of its own: dataclasses, pydantic and pickle look their classes up in sys.modules."""
    # So that tracebacks show the line.
    linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)
    module = sys.modules["rlhf_code"] = types.ModuleType("rlhf_code")
    exec(compile(code, filename, "exec", dont_inherit=True), module.__dict__)
    found: Function | None = getattr(module, name.partition("(")[0], None)
    if not callable(found):
        raise LookupError(f"{filename} defines no {kind} {name}")
    return found


class Episodes:
    """The environments of this subprocess, by the number of their episode."""

    def __init__(self, make: Function) -> None:
        self.make, self.open = make, dict[int, Any]()

    def __call__(self, episode: int, action: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        """arguments: of `reset` and `step`, by themselves, for a column of the data may have any name."""
        arguments = arguments or {}
        if action == "close":
            self.open.pop(episode, None)
        elif action == "reset":
            self.open[episode] = self.make()
            self.open[episode].reset(**arguments)
        elif episode not in self.open:
            raise LookupError("its process was killed with another episode's call")
        else:
            environment = self.open.pop(episode)  # one that raises is not asked again
            answer = self._answer(environment.step(**arguments))
            self.open[episode] = environment
            return answer
        return {}

    def _answer(self, step: Any) -> dict[str, Any]:
        match step:
            case {"observation": str(said), "done": done, **rest} if _is_bool(done) and rest.keys() <= {"reward"}:
                reward = rest.get("reward")
                value = None if reward is None else number(reward)
                return {"observation": said, "done": bool(done), "reward": value}
        raise TypeError(
            f'step returned {shown(step)}, {{"observation": str, "done": bool, "reward": float or None}} is needed'
        )


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")  # numpy's, which is not imported here


def number(value: Any) -> float:
    """Also of numpy's scalars and of tensors with one element. Raises TypeError, or OverflowError beyond the floats."""
    if isinstance(value, numbers.Real) or (
        hasattr(type(value), "__float__") and not isinstance(value, str | bytes | numbers.Complex)
    ):
        return float(value)
    raise TypeError(f"returned {shown(value)} of type {type(value).__name__}, a number is needed")


def shown(value: Any) -> str:
    """As python shows it, cut; a value that cannot be shown is no reason to die."""
    try:
        return f"{value!r:.200}"
    except BaseException as error:
        return f"a value whose __repr__ raises {type(error).__name__}"


def rewards(function: Function, group: bool, /, **arguments: Any) -> list[Any]:
    """One entry a completion, each a number with metrics beside it. Raises what the function raises, or TypeError."""
    value = function(**arguments)
    if not group:
        return [_entry(value)]
    if isinstance(value, str | bytes | dict) or not hasattr(type(value), "__iter__"):
        raise TypeError(f"returned {shown(value)} of type {type(value).__name__}, a list of numbers is needed")
    return [_entry(item) for item in value]


def _entry(value: Any) -> list[Any]:
    reward, metrics = value if isinstance(value, tuple) and len(value) == 2 else (value, {})
    if not isinstance(metrics, dict):
        raise TypeError(f"returned {shown(value)}, beside a number only {{metric: number}} may stand")
    return [number(reward), {str(name): number(metric) for name, metric in metrics.items()}]


def call(function: Function, arguments: dict[str, Any]) -> dict[str, Any]:
    """The answer to one call. Also SystemExit is only an error of this sample."""
    try:
        return {"value": function(**arguments)}
    except BaseException:
        return {"error": tail()}


def tail() -> str:
    """The end of the current exception's traceback, without the frames of this file and of the import machinery."""
    error = sys.exception()
    assert error is not None, "called where no exception is handled"
    trace = traceback.TracebackException.from_exception(error)
    trace.stack = traceback.StackSummary.from_list(
        [
            f for f in trace.stack
            if f.filename not in (__file__, importlib.__file__) and "importlib._boot" not in f.filename
        ]
    )
    return "".join(trace.format())[-ERROR_LIMIT:].strip()


def _listen(connection: socket.socket, requests: "queue.SimpleQueue[Any]") -> None:
    with connection.makefile("rb") as stream:
        status = 1
        try:
            while stream.peek(1):  # nothing: the parent is gone
                requests.put(pickle.load(stream))
            status = 0
        except BaseException:  # of what this process cannot unpickle, or the parent's death in the middle of it
            traceback.print_exc()
        finally:  # also where nobody reads what is printed
            os._exit(status)


def _loaded(spec: dict[str, Any], episodes: bool, group: bool) -> tuple[Function | None, dict[str, Any]]:
    try:
        found = load(**spec)
    except BaseException:
        return None, {"error": tail()}
    return Episodes(found) if episodes else partial(rewards, found, group), {"value": None}


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, requests), daemon=True).start()
    function, answer = _loaded(**requests.get())
    connection.sendall(json.dumps(answer).encode() + b"\n")
    while function is not None:
        answer = call(function, requests.get())
        connection.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
