"""vLLM's scheduler with many tokens of a request in a message: a token each costs more than the model's own step.

vLLM sends every new token of every request from its core to the engine's process on its own: with log probabilities
these are three arrays a token. Here the tokens of a request that wants nothing before its end are kept in the core and
sent some `TOKENS` at a time. The hook (`scheduler_cls`) is not a stable part of vLLM: `misfit` says whether these
classes are the ones that this file was written for. Loaded in the core's process too; imports vLLM. """

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import LogprobsLists

from rlhf_worker.engines.slots import ask_at_borders

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request, RequestStatus

TOKENS = 32  # steps from one message of a request to the next
COLUMNS = 129  # numbers a token, at most: of more the message is no longer the cost
# What an output may have. Any but the first three, and it goes out at once and as it is.
FIELDS = {
    "request_id", "new_token_ids", "new_logprobs", "new_prompt_logprobs_tensors", "pooling_output", "finish_reason",
    "stop_reason", "events", "kv_transfer_params", "ec_transfer_params", "trace_headers", "prefill_stats",
    "routed_experts", "num_nans_in_logits", "mm_cache_miss_hashes", "new_sampling_mask", "spec_decode_metrics",
    "prompt_token_id_logprobs",
}  # fmt: skip
ROWS = ("logprob_token_ids", "logprobs", "sampled_token_ranks", "cu_num_generated_tokens")
METHODS = ("update_from_output", "finish_requests", "has_requests", "pause_state")


def misfit(own: type) -> str:
    """What of vLLM, which would use the scheduler `own`, is not as this file expects it; "" where all is."""
    if own not in MERGING:
        return f"its scheduler is {own.__name__}"
    if differ := FIELDS ^ set(EngineCoreOutput.__struct_fields__):
        return f"EngineCoreOutput differs in {', '.join(sorted(differ))}"
    if LogprobsLists._fields != ROWS:
        return f"LogprobsLists has {', '.join(LogprobsLists._fields)}"
    missing = [name for name in METHODS if name not in vars(Scheduler)]
    return f"Scheduler has no {', '.join(missing)}" if missing else ""


def waits(request: "Request") -> bool:
    """Whether its tokens may be kept: nobody reads them before its end, which the core alone decides.

    A text that ends it is found by who makes text of the tokens, outside the core: tokens that came late would be
    tokens too many. """
    params = request.sampling_params
    return (
        params is not None and params.output_kind is RequestOutputKind.FINAL_ONLY and not params.stop
        and -1 < (params.num_logprobs or 0) < COLUMNS and not params.logprob_token_ids and not request.resumable
    )  # fmt: skip


class Window:
    """Log probabilities of the steps since the last message, a row a token, in one place each: a slice of vLLM's own
    arrays a request and step is what costs, and those arrays may lie in pinned memory.
    """

    def __init__(self) -> None:
        self.ids: NDArray[np.int32] = np.empty((0, 0), np.int32)  # (rows, columns)
        self.logprobs: NDArray[np.float32] = np.empty((0, 0), np.float32)
        self.ranks: NDArray[np.int32] = np.empty((0, 1), np.int32)
        self.start = self.end = 0  # of the last step's rows
        self.last: LogprobsLists | None = None
        self.starts: list[int] | None = None  # of each request's rows in the last step, where it may have several

    def add(self, arrays: LogprobsLists) -> None:
        """A step's. It has as many columns as its whole batch wants, at least those that each request does."""
        self.last, self.starts = arrays, arrays.cu_num_generated_tokens
        self.start, self.end = self.end, self.end + len(arrays.logprobs)
        ids, logprobs = arrays.logprob_token_ids[:, :COLUMNS], arrays.logprobs[:, :COLUMNS]
        self.ids = _filled(self.ids, self.start, ids)
        self.logprobs = _filled(self.logprobs, self.start, logprobs)
        self.ranks = _filled(self.ranks, self.start, arrays.sampled_token_ranks[:, None])

    def slice_request(self, index: int, count: int) -> tuple[int, ...]:
        """Stands in for the last step's arrays where vLLM deals them out: which rows are a request's."""
        first = self.start + (index if self.starts is None else self.starts[index])
        return (first,) if count == 1 else tuple(range(first, first + count))

    def whole(self, rows: tuple[int, ...]) -> LogprobsLists:
        """Of the last step, with all columns."""
        assert self.last is not None
        first = rows[0] - self.start if rows else 0
        return LogprobsLists(*(array[first : first + len(rows)] for array in self.last[:3]))

    def taken(self, rows: list[int], columns: int) -> LogprobsLists:
        return LogprobsLists(self.ids[rows, :columns], self.logprobs[rows, :columns], self.ranks[rows, 0])

    def clear(self) -> None:
        self.start = self.end = 0


def _filled(room: NDArray[Any], start: int, rows: NDArray[Any]) -> NDArray[Any]:
    """`room`, or a larger one with its content, with the rows from `start` on."""
    end, columns = start + rows.shape[0], rows.shape[1]
    if end > room.shape[0] or columns > room.shape[1]:
        larger = np.empty((max(2 * end, room.shape[0]), max(columns, room.shape[1])), room.dtype)
        larger[:start, : room.shape[1]] = room[:start]
        room = larger
    room[start:end, :columns] = rows
    return room


class Kept:
    """Of one request what was not sent yet. Flat lists: small objects would keep the garbage collector busy."""

    __slots__ = ("client", "columns", "rows", "token_ids")

    def __init__(self, request: "Request") -> None:
        params = request.sampling_params
        assert params is not None
        self.client = request.client_index
        self.columns = None if params.num_logprobs is None else 1 + params.num_logprobs
        self.token_ids: list[int] = []
        self.rows: list[int] = []  # of the window, one a token

    def output(self, name: str, window: Window) -> EngineCoreOutput:
        """All of it, which then is kept no longer."""
        token_ids, rows = self.token_ids, self.rows
        self.token_ids, self.rows = [], []
        given = None if self.columns is None else window.taken(rows, self.columns)
        return EngineCoreOutput(name, token_ids, new_logprobs=given)


class Merging(Scheduler):  # type: ignore[misc]
    """Keeps outputs of requests that wait for their end, from their second token on.

    vLLM gives all tokens of a message the version that its weights have when the message leaves, so what is kept goes
    out before a pause is complete. """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ask_at_borders(self.kv_cache_manager)
        self._kept: dict[str, Kept] = {}  # of each request that waits
        self._window = Window()
        self._steps = 0  # since all that was kept went out; 0 too where nothing waits

    def update_from_output(
        self, scheduler_output: "SchedulerOutput", model_runner_output: "ModelRunnerOutput",
    ) -> dict[int, EngineCoreOutputs]:
        if model_runner_output.logprobs:
            self._window.add(model_runner_output.logprobs)
            model_runner_output.logprobs = self._window
        messages: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        for message in messages.values():
            message.outputs = self._sent(message.outputs)
        self._steps = self._steps + 1 if self._kept else 0
        if self._steps >= TOKENS or self.pause_state is PauseState.PAUSED_ALL:
            for client, outputs in self._emptied().items():
                messages.setdefault(client, EngineCoreOutputs()).outputs += outputs
        if not self._steps:
            self._window.clear()
        return messages

    def _sent(self, outputs: list[EngineCoreOutput]) -> list[EngineCoreOutput]:
        """Those that are not kept."""
        sent: list[EngineCoreOutput] = []
        for output in outputs:  # of every request in every step
            kept = self._kept.get(output.request_id)
            if (
                kept is None or output.finish_reason is not None or output.events is not None
                or output.routed_experts is not None or output.new_sampling_mask is not None
            ):  # fmt: skip
                sent += self._at_once(output, kept)
                continue
            kept.token_ids += output.new_token_ids
            if output.new_logprobs is not None:
                kept.rows += output.new_logprobs
        return sent

    def _at_once(self, output: EngineCoreOutput, kept: Kept | None) -> list[EngineCoreOutput]:
        """With what was kept before it."""
        name = output.request_id
        before = [kept.output(name, self._window)] if kept and kept.token_ids else []
        if output.new_logprobs is not None:
            output.new_logprobs = self._window.whole(output.new_logprobs)
        if output.finish_reason is not None:
            self._kept.pop(name, None)
        elif kept is None and waits(self.requests[name]):
            self._kept[name] = Kept(self.requests[name])
        return [*before, output]

    def _emptied(self) -> dict[int, list[EngineCoreOutput]]:
        """All that is kept, by client."""
        found: dict[int, list[EngineCoreOutput]] = {}
        for name, kept in self._kept.items():
            if kept.token_ids:
                found.setdefault(kept.client, []).append(kept.output(name, self._window))
        self._steps = 0
        return found

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: "RequestStatus",
    ) -> "list[Request]":
        """Of what ends from outside nobody reads the tokens."""
        finished: list[Request] = super().finish_requests(request_ids, finished_status)
        for request in finished:
            self._kept.pop(request.request_id, None)
        return finished

    def has_requests(self) -> bool:
        """A pause is complete when this is False: until then the core makes steps, if empty ones."""
        return self._steps > 0 or bool(super().has_requests())


class MergingScheduler(Merging):
    pass


class MergingAsyncScheduler(Merging, AsyncScheduler):  # type: ignore[misc]
    pass


# By vLLM's own class, ours in its place.
MERGING: dict[type, type] = {Scheduler: MergingScheduler, AsyncScheduler: MergingAsyncScheduler}
