"""A subprocess that calls one reward function, or holds episodes of one environment: `python -m rlhf_worker.rewards.child FD`, FD one end of a socket pair.

The parent sends pickles (first what to load, then the arguments of one call each) and gets one line of JSON for each:
{"value": float} or {"error": text}. What the function prints goes to standard error. When the parent is gone, so is the child,
also in the middle of a call.
"""

import builtins
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
from collections.abc import Callable
from typing import Any

ERROR_LIMIT = 2000  # characters of a traceback's tail

Function = Callable[..., Any]


def load(function: str | None, code: str | None, field: str, kind: str, name: str) -> Function:
    """What a spec's `field` names: the `kind` at `module:kind`, or the `name` that `code` defines. Raises whatever the import raises, or LookupError."""
    if code is not None:
        return _from_code(code, f"<{field}.code>", kind, name)
    module, _, attribute = (function or "").partition(":")
    found: Function | None = getattr(importlib.import_module(module), attribute, None)
    if not callable(found):
        raise LookupError(f"module {module} has no {kind} {attribute!r}: {field}.function must be module:{kind}")
    return found


def _from_code(code: str, filename: str, kind: str, name: str) -> Function:
    linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)  # so that tracebacks show the line
    namespace: dict[str, Any] = {"__name__": "rlhf_code", "__builtins__": builtins}
    exec(compile(code, filename, "exec"), namespace)
    found: Function | None = namespace.get(name.partition("(")[0])
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
            case {"observation": str(observation), "done": bool(done), **rest} if rest.keys() <= {"reward"}:
                reward = rest.get("reward")
                if reward is None or isinstance(reward, numbers.Real):
                    return {"observation": observation, "done": done, "reward": None if reward is None else float(reward)}
        raise TypeError(f'step returned {step!r:.200}, {{"observation": str, "done": bool, "reward": float or None}} is needed')


def call(function: Function, arguments: dict[str, Any]) -> dict[str, Any]:
    """The answer to one call. Also SystemExit is only an error of this sample."""
    try:
        value = function(**arguments)
        if isinstance(function, Episodes):
            return {"value": value}
        if isinstance(value, numbers.Real):
            return {"value": float(value)}  # OverflowError of an integer beyond the floats
    except BaseException:
        return {"error": tail()}
    return {"error": f"returned {value!r:.200} of type {type(value).__name__}, a number is needed"}


def tail() -> str:
    """The end of the current exception's traceback, without the frames of this file and of the import machinery."""
    error = sys.exception()
    assert error is not None, "called where no exception is handled"
    trace = traceback.TracebackException.from_exception(error)
    trace.stack = traceback.StackSummary.from_list(
        [f for f in trace.stack if f.filename not in (__file__, importlib.__file__) and "importlib._boot" not in f.filename]
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


def _loaded(spec: dict[str, Any], episodes: bool) -> tuple[Function | None, dict[str, Any]]:
    try:
        found = load(**spec)
    except BaseException:
        return None, {"error": tail()}
    return Episodes(found) if episodes else found, {"value": 0.0}


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
