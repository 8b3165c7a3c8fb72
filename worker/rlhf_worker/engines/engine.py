"""One vLLM engine as a Ray actor: token ids in; token ids, their log probabilities and text out.

vLLM is imported after the environment is set, because it reads it at import.
"""

import asyncio
import gc
import os
import pickle
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from pydantic import ValidationError

from rlhf_api.memory import engine_share
from rlhf_api.run import RunConfig
from rlhf_worker.deadlines import silent_seconds, work_seconds
from rlhf_worker.engines.adapters import Adapters, adapter_args, version_of
from rlhf_worker.engines.arguments import (
    check_attention,
    check_context,
    check_engine_args,
    check_known,
    needed_context,
    refused,
)
from rlhf_worker.engines.load import Load
from rlhf_worker.engines.pulse import Pulse, stopped
from rlhf_worker.errors import BadSpec, Call, DeadlineExceeded, EngineFailed, Problems, Verdict, said, verdict
from rlhf_worker.hub import ensure
from rlhf_worker.placement import Seat, ray_share
from rlhf_worker.pretrained import context_length, load_config, load_tokenizer, location
from rlhf_worker.roll import Member
from rlhf_worker.weights.backends import engine_backend

if TYPE_CHECKING:
    from vllm import AsyncEngineArgs, RequestOutput, SamplingParams
    from vllm.config import VllmConfig
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    from rlhf_worker.experience import Sample
    from rlhf_worker.rollout.environment import Environments
    from rlhf_worker.rollout.episode import Episode, Request, Turn
    from rlhf_worker.weights.compare import EngineSums

    Checked = tuple[AsyncEngineArgs, UsageContext, VllmConfig]

CPU_KV_CACHE_BYTES = 256 << 20
Place = tuple[int, int]  # of how many calls which one
ORDER_SECONDS = 0.02  # outputs that left the core before its answer are read after it, by another task
ANSWER_SECONDS = 30.0  # for a core that is past a deadline: it answers between its steps
# Calls of `generate` at a time; Ray keeps what is beyond. All other calls are of the default group, on a thread of
# their own, and wait for none of them.
GROUPS = {"work": 10_000}


class Engine(Member):
    """Created in its bundle by `placement`; `start` does the work, so that a failure is the call's and not the actor's.
    """

    def __init__(
        self, config: RunConfig, index: int, device: str, bundles: list[int], gpus: list[str], threads: int,
    ) -> None:
        """bundles: one a tensor-parallel rank; gpus: all of this node, the first rank's own first."""
        self.config = config
        self.index = index
        self.device = device
        self.bundles = bundles
        self.gpus = gpus
        self.threads = threads
        self.version = 0
        self.stale = False  # between a sync's begin and its end: what it holds is no version
        self.environments: dict[str, Environments] = {}
        self.checked: Checked | None = None
        self.asleep = False
        # with adapters for good: no sync brings the model below them, and vLLM keeps their slots where it keeps that
        self.sleep_level = 1
        self.llm: AsyncLLM | None = None
        self.adapters: Adapters | None = None  # with model.lora
        self.adapter_args: dict[str, Any] = {}
        self._requests = self._ended = 0  # requests that were made; those that came to their end
        self._live: set[str] = set()  # requests under way
        self._wave: dict[int, Callable[[], None]] = {}  # calls that wait for the others that are to begin with them
        self._begun: asyncio.Future[None] | None = None  # the wave
        self._load = Load()
        self._gate = asyncio.Lock()  # from a batch's hold to its resume no sync begins
        self._pulse = Pulse(lambda: self._running().is_paused())

    async def prepare(self, backend: str) -> None:
        """All of a start that takes no memory of the device, once: checks, environments, and vLLM's import, which takes
        as long as the rest. Raises BadSpec.
        """
        if self.checked is not None:
            return
        await asyncio.to_thread(ensure, self.config.model, work_seconds(self.config))
        problems = Problems()
        with problems:
            check_engine_args(self.config)
        with problems:
            check_context(self.config, context_length(load_config(self.config.model)))
        self._environment(backend)
        import vllm

        with problems:
            known = {f.name: f.type for f in fields(vllm.AsyncEngineArgs)}
            check_known(self.config.rollout.engine_args, known, vllm.__version__)
        with problems:
            self.adapter_args = adapter_args(self.config)
        with problems:
            self._open_environments()
        problems.tell()
        self.checked = self._checked(backend)

    async def start(self, backend: str) -> str:
        """Load the model into vLLM. Returns vLLM's version. Raises BadSpec."""
        await self.prepare(backend)
        self._loop = asyncio.get_running_loop()
        assert self.checked is not None
        import vllm
        from vllm.v1.engine.async_llm import AsyncLLM

        args, use, made = self.checked
        try:
            self.llm = AsyncLLM.from_vllm_config(
                made, usage_context=use, enable_log_requests=args.enable_log_requests,
                disable_log_stats=args.disable_log_stats,
            )  # fmt: skip
        except Exception as error:
            raise EngineFailed(f"engine {self.index} did not start: {error}; its log ends: {printed()}") from error
        await self.llm.update_weight_version("0")
        if self.adapter_args:
            self.adapters = Adapters(self.llm)
        gc.collect()
        gc.freeze()  # what is there now stays: no collection between two messages of the core need look at it
        return str(vllm.__version__)

    def _checked(self, backend: str) -> "Checked":
        """What vLLM makes of the arguments and the model's config, before anything is loaded. Raises BadSpec."""
        import vllm
        from vllm.usage.usage_lib import UsageContext

        try:
            # The batch sizes that vLLM chooses for offline generation; without this, those for an unknown use: 128
            # sequences.
            use, args = UsageContext.LLM_CLASS, vllm.AsyncEngineArgs(**self._engine_args(backend))
            look_here(load_config(self.config.model).architectures or ())
            made = args.create_engine_config(use)
            if captures_more(args, made):
                made = args.create_engine_config(use)
            check_attention(self.config, made.model_config)
        except BadSpec:
            raise
        except Exception as error:
            if verdict(Call.ENGINE, error) is not Verdict.SPEC:
                raise
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else said(error)
            raise refused(self.config, reason, vllm.__version__) from None
        if why := merge_outputs(made):
            print(f"engine {self.index}: a token a message, which is slow: vLLM {vllm.__version__}: {why}",
                file=sys.stderr, flush=True)
        return args, use, made

    def _open_environments(self) -> None:
        from rlhf_worker.rollout.environment import opened
        from rlhf_worker.rollout.episode import Speech

        tokenizer = load_tokenizer(self.config.model)
        self.environments = opened(self.config, tokenizer)
        self.speech = Speech.of(tokenizer, self.config)

    def _environment(self, backend: str) -> None:
        env = {
            "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
            # Functions and CUDA IPC handles travel from this actor to its own worker processes, and nowhere else.
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
            # vLLM's own processes join this Ray, whatever others the machine runs.
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            "VLLM_RAY_PER_WORKER_GPUS": str(ray_share(self.config.placement)),
            "VLLM_RAY_BUNDLE_INDICES": ",".join(map(str, self.bundles)),
        }
        if self.device == "cpu":
            env |= {
                "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(self.threads), "TORCHDYNAMO_DISABLE": "1",
                # Lets vLLM keep its one worker in the engine process: the threads are not bound, so it needs none of
                # its own.
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            }
        elif backend == "ipc" and len(self.bundles) == 1:
            # A handle opens only where the GPU that holds the memory is visible: other trainer ranks' too.
            env["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        os.environ.update(env)
        if len(self.bundles) > 1 and not os.environ.get("CUDA_VISIBLE_DEVICES"):
            # This actor holds no GPU, its workers do; an empty list would hide them from vLLM's view of the machine.
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)

    def _engine_args(self, backend: str) -> dict[str, Any]:
        config, ranks = self.config, len(self.bundles)
        args: dict[str, Any] = {
            "max_model_len": needed_context(config), "seed": config.sampling_seed + self.index,
            "disable_log_stats": True, "gpu_memory_utilization": engine_share(config),
            "enable_sleep_mode": config.engines_sleep,
        }
        if self.device == "cpu":
            # vLLM's CPU generators cannot be wound back, which a seeded request needs when its prompt is prefilled in
            # chunks.
            args |= {
                "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES, "enforce_eager": True, "enable_chunked_prefill": False,
            }
        args |= config.rollout.engine_args
        if isinstance(overrides := args.get("hf_overrides") or {}, dict):
            args["hf_overrides"] = {"head_dtype": "float32"} | overrides  # as the trainer's head
        if config.rollout.sampling.top_k:  # vLLM's limit is 20; -1 is none
            given = args.get("max_logprobs", 20)
            args["max_logprobs"] = given if given == -1 else max(given, config.rollout.sampling.top_k)
        transfer = {} if self.adapter_args else {"weight_transfer_config": {"backend": engine_backend(backend)}}
        return args | transfer | self.adapter_args | {
            "model": location(config.model), "dtype": config.model.dtype,
            "trust_remote_code": config.model.trust_remote_code, "tensor_parallel_size": ranks,
            "distributed_executor_backend": self._executor(backend), "logprobs_mode": "processed_logprobs",
        }

    def _executor(self, backend: str) -> Any:
        if len(self.bundles) == 1 and backend != "sharded_rdt":  # whose workers must be Ray's
            return "uni"
        if self.device == "cpu":
            from rlhf_worker.engines.cpu_executor import CPURayExecutor

            return CPURayExecutor
        return "ray"

    def _running(self) -> "AsyncLLM":
        if self.llm is None:
            raise RuntimeError(f"engine {self.index} was used before start()")
        return self.llm

    def slots(self) -> int:
        """Completions that it computes at once."""
        assert self.checked is not None
        return int(self.checked[2].scheduler_config.max_num_seqs)

    async def seats(self) -> list[Seat]:
        """Where each tensor-parallel rank runs."""
        if self.device == "cpu" and len(self.bundles) == 1:
            return [Seat.here("cpu")]
        found: list[Seat] = await self._running().collective_rpc(_worker_seat)
        return found

    @ray.method(concurrency_group="work")  # type: ignore[untyped-decorator]
    async def generate(
        self, requests: "list[Request]", deadline_seconds: float, place: Place | None = None
    ) -> "list[Sample | None]":
        """One completion a request, in order; None for each that the deadline cut off, and what there is of each that
        `interrupt` did.

        Raises EnvironmentFailed; DeadlineExceeded where the engine finished nothing at all meanwhile; EngineFailed once
        vLLM's core is gone, or answers nothing at the deadline; RuntimeError between a sync that failed and the next
        one that does not.

        place: among calls that begin together: all their requests wait in the queue, in the calls' order, before the
        first is scheduled, so that the same requests make the same batches, and on one machine the same bits, whatever
        the timing. None: they join those that run, with staleness also over a sync. """
        self._running()
        work = self._completions(requests, deadline_seconds, place)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))  # vLLM's

    async def _completions(
        self, requests: "list[Request]", deadline_seconds: float, place: Place | None = None
    ) -> "list[Sample | None]":
        tasks: list[asyncio.Task[Sample]] = []
        try:
            await self._begin(requests, tasks, place)
            ended = self._ended
            done, late = await asyncio.wait(tasks, timeout=deadline_seconds, return_when=asyncio.FIRST_EXCEPTION)
            if failed := next((error for task in done if (error := task.exception())), None):
                raise failed
            words = f"of {len(tasks)} completions it finished {len(done)} in {deadline_seconds:g} s"
            if late and not self.stale:
                await self._answer(words)
                if not done and self._ended == ended:
                    raise DeadlineExceeded(f"engine {self.index}: {words} (spec.rollout.deadlineSeconds): raise it, or "
                        "lower rollout.maxTokens")
            return [task.result() if task in done else None for task in tasks]
        except Exception as error:
            if self._running().errored:  # whatever it is that a request found first
                raise EngineFailed(f"engine {self.index} is dead: {error}") from error
            raise
        finally:
            for task in tasks:
                task.cancel()

    async def _begin(
        self, requests: "list[Request]", tasks: "list[asyncio.Task[Sample]]", place: Place | None
    ) -> None:
        def begin() -> None:
            tasks.extend(asyncio.create_task(self._sample(request)) for request in requests)

        if place is None:
            await self._whole(self.config.weight_sync.deadline_seconds if self.config.rollout.staleness else 0.0)
            begin()
            return
        index, count = place
        begun = self._begun = self._begun or asyncio.get_running_loop().create_future()
        self._wave[index] = begin
        if len(self._wave) == count:
            wave, self._wave, self._begun = self._wave, {}, None
            try:
                await self._together([wave[number] for number in sorted(wave)])
                begun.set_result(None)
            except Exception as error:
                begun.set_exception(error)
        await begun

    async def _together(self, wave: "list[Callable[[], None]]") -> None:
        llm = self._running()
        async with self._gate:
            await self._whole(0.0)
            await llm.get_supported_tasks()  # which the first requests would ask for, and be overtaken by the resume
            await self._hold()
            for begin in wave:
                begin()
            await asyncio.sleep(0)  # let every task hand its request over
            await llm.resume_generation()

    async def interrupt(self) -> None:
        """Cut off every completion where it stands; what there is of it is `generate`'s answer."""
        llm = self._running()
        async with self._gate:
            await self._hold()  # what the core keeps comes out
            await asyncio.sleep(ORDER_SECONDS)
            await llm.abort(list(self._live))
            await llm.resume_generation()

    async def _answer(self, words: str) -> None:
        """Of the core, which was late. Raises EngineFailed."""
        try:
            await asyncio.wait_for(self._running().is_paused(), ANSWER_SECONDS)
        except TimeoutError:
            raise EngineFailed(f"engine {self.index} hangs: {words}, and does not answer") from None

    async def _whole(self, seconds: float) -> None:
        """Waits for the end of a sync that is under way. Raises RuntimeError."""
        end = asyncio.get_running_loop().time() + seconds
        while self.stale:
            if asyncio.get_running_loop().time() >= end:
                raise RuntimeError(f"engine {self.index} holds a part of a sync, after version {self.version}: it "
                    "serves nothing until a whole one")
            await asyncio.sleep(0.01)

    async def _sample(self, request: "Request") -> "Sample":
        from rlhf_worker.rollout.episode import Episode

        if environments := self.environments.get(request.evaluation):
            return await environments.play(request, self._turn)
        episode = Episode(request)
        episode.add(await self._turn(episode))
        return episode.sample(self.speech)

    async def _turn(self, episode: "Episode") -> "Turn":
        from rlhf_worker.rollout.episode import Turn
        from rlhf_worker.rollout.sampling import support

        found = await self._final(episode.context, self._params(episode))
        output = found.outputs[0]
        if not output.token_ids and output.finish_reason == "abort":  # it had not begun
            return Turn([], [], [], "abort")
        ends = ("stop", "length", "abort")
        if output.finish_reason not in ends or output.logprobs is None or output.weight_versions is None:
            raise RuntimeError(f"engine {self.index}: a completion ended as {output.finish_reason!r}")
        versions = [int(span.version) for span in output.weight_versions for _ in range(span.end - span.start)]
        if found.lora_request is not None:  # a request keeps its adapter, whatever is loaded meanwhile
            versions = [version_of(found.lora_request)] * len(output.token_ids)
        token_ids, logprobs, sets = list(output.token_ids), list(output.logprobs.logprobs), None
        if episode.request.wants_support:
            shape = len(token_ids), -1
            given, sets = support(np.reshape(output.logprobs.token_ids, shape), np.reshape(logprobs, shape))
            logprobs = given.tolist()
        stop = output.stop_reason if isinstance(output.stop_reason, str) else ""
        return Turn(token_ids, logprobs, versions, output.finish_reason, stop, sets)

    def _params(self, episode: "Episode") -> "SamplingParams":
        """Log probabilities are of the distribution drawn from; as many as topK show all of it.

        With text only where it may end a turn, and one list of numbers in place of a dictionary a token: that work
        would be done between any two steps of the GPU.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        request, spec = episode.request, episode.request.sampling
        vocabulary = self._running().model_config.get_vocab_size()
        return SamplingParams(
            temperature=request.temperature, top_p=spec.top_p, top_k=spec.top_k, min_p=spec.min_p, seed=episode.seed,
            repetition_penalty=spec.repetition_penalty, presence_penalty=spec.presence_penalty,
            frequency_penalty=spec.frequency_penalty, max_tokens=episode.left, min_tokens=episode.least,
            stop=list(spec.stop), stop_token_ids=list(spec.stop_token_ids), detokenize=bool(spec.stop),
            logprobs=min(spec.top_k, vocabulary) if request.wants_support else 0,
            output_kind=RequestOutputKind.FINAL_ONLY, flat_logprobs=True, skip_clone=True,
        )  # fmt: skip

    async def _final(self, token_ids: list[int], params: "SamplingParams") -> "RequestOutput":
        from vllm.inputs.engine import tokens_input

        self._requests += 1
        name = f"{self.index}-{self._requests}"
        self._live.add(name)
        try:
            with self._load.one(), self.adapters.lent() if self.adapters else nullcontext() as adapter:
                outputs = self._running().generate(
                    tokens_input(token_ids, cache_salt=self._salt), params, name, lora_request=adapter,
                )
                found = [output async for output in outputs if output.finished]
        finally:
            self._live.discard(name)
        if not found:
            raise RuntimeError(f"engine {self.index}: a request came back without output")
        self._ended += 1
        self._pulse.beat()
        return found[0]

    @property
    def _salt(self) -> str | None:
        """Parts vLLM's prefix cache by the version of the weights, where requests run on while those change."""
        return str(self.version) if self.config.rollout.staleness else None

    async def probe(self, token_ids: list[int]) -> list[float]:
        """Log probability of each token after the first, at temperature 1: what the delivery check compares."""
        from vllm import SamplingParams

        output = await self._final(token_ids, SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0, seed=0))
        if output.prompt_logprobs is None:
            raise RuntimeError(f"engine {self.index}: vLLM gave no prompt log probabilities")
        pairs = zip(token_ids[1:], output.prompt_logprobs[1:], strict=True)
        return [by_token[token].logprob for token, by_token in pairs if by_token is not None]

    async def ping(self) -> None:
        """Returns if vLLM's processes are there and at work. Raises EngineFailed with what they printed last."""
        llm = self._running()
        try:
            await llm.check_health()
        except Exception as error:
            raise EngineFailed(f"engine {self.index} is dead: {error}; its log ends: {printed()}") from error
        if pids := stopped(os.getpid()):
            raise EngineFailed(f"engine {self.index} hangs: a signal stopped its processes {pids}")
        if self.stale or self.asleep:  # what a sync asks of the core has a deadline of its own
            self._pulse.forget()
        elif (silent := self._pulse.silent_seconds()) > silent_seconds(self.config):
            words = f"for {silent:.0f} s it finished nothing and did not answer"
            raise EngineFailed(f"engine {self.index} hangs: {words}; its log ends: {printed()}")

    async def load(self) -> dict[int, float]:
        """Seconds by the number of requests under way, since it was last asked."""
        return self._load.taken()

    async def alive(self) -> None:
        """Returns if the engine's workers answer."""
        await self._running().collective_rpc("check_health")

    async def checksums(self, names: tuple[str, ...] = ()) -> list["EngineSums"]:
        """Of each tensor-parallel rank. names: of the adapters' tensors, where those are what is synced."""
        from rlhf_worker.weights.receiver import checksums
        from rlhf_worker.weights.slots import held

        number = self.adapters.current.lora_int_id if self.adapters and self.adapters.current else 0
        ask = partial(held, number=number, names=names) if self.adapters else checksums
        return [pickle.loads(rank) for rank in await self._running().collective_rpc(ask)]

    async def _hold(self) -> None:
        """No step runs from here to the next resume; requests wait. vLLM's own pause_generation sleeps 20 ms more, for
        the order of outputs.
        """
        await self._running().engine_core.pause_scheduler_async(mode="keep", clear_cache=False)

    async def pause(self) -> None:
        """The weights are about to change: until `adopt` this engine serves nothing. One that sleeps takes memory for
        them, and no more yet.
        """
        async with self._gate:
            self.stale = True
        if self.asleep:
            await self._running().wake_up(["weights"])
        await self._hold()

    async def adopt(self, version: int) -> None:
        """The new weights are in place: count from the new version, and go on.

        What the old ones computed serves no new request. With staleness those that run keep it: to compute it anew, all
        of them at once, would hold up the engine for as long as a prefill of all that it has. """
        llm = self._running()
        if self.asleep:
            await llm.wake_up(["kv_cache"])
            self.asleep = False
        if self.adapters is None and self._salt is None:  # vLLM keys its cache by the adapter, and by the salt
            await llm.reset_prefix_cache(reset_running_requests=True)
        await llm.update_weight_version(str(version))
        self.version, self.stale = version, False
        await llm.resume_generation()

    async def sleep(self) -> None:
        """Give the GPU's memory back until the next sync, once. Level 1 moves the weights to the host, 2 drops them;
        the KV cache goes in any case.
        """
        if not self.asleep:
            self.stale = self.asleep = True
            await self._running().sleep(level=self.sleep_level)

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._running().init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def weight_plan(self, metas: bytes, distrusted: frozenset[str]) -> list[bytes]:
        """Of each tensor-parallel rank, a pickled RankPlan for the trainer's pickled ParamMetas."""
        from rlhf_worker.weights.receiver import plan_of

        plans: list[bytes] = await self._running().collective_rpc(partial(plan_of, metas=metas, distrusted=distrusted))
        # A sync brings back all that a plan covers; what it leaves alone must survive a sleep on the host.
        self.sleep_level = 1 if any(pickle.loads(plan).kept for plan in plans) else 2
        return plans

    async def load_adapter(self, version: int, files: dict[str, bytes]) -> None:
        assert self.adapters is not None
        await self.adapters.load(version, files)

    async def start_weight_update(self) -> None:
        await self._running().start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._running().update_weights(WeightTransferUpdateRequest(update_info=update_info))

    async def finish_weight_update(self) -> None:
        await self._running().finish_weight_update()

    async def close(self) -> None:
        for environments in self.environments.values():
            environments.close()
        if self.llm is not None:
            self.llm.shutdown(timeout=0)
            self.llm = None


def look_here(architectures: Iterable[str]) -> None:
    """Have vLLM look at a model's class in this process.

    By itself it starts another, unless it finds what an earlier one kept: one more import of torch and vLLM, so that
    CUDA is not initialised where it forks. In a Ray actor it does not fork. """
    from vllm.model_executor.models import ModelRegistry

    for name in architectures:
        if known := ModelRegistry.models.get(name):
            with suppress(Exception):  # which vLLM tells as it looks by itself
                ModelRegistry.register_model(name, known.load_model_cls())


def captures_more(args: "AsyncEngineArgs", made: "VllmConfig") -> bool:
    """Has vLLM capture CUDA graphs for as many sequences as run at a time, unless the user says for how many.

    By itself it stops at 512, also where it runs 1,024: a step of more is then launched kernel by kernel. Returns
    whether `args` changed, of which `made` is the configuration. """
    most, graphs = made.scheduler_config.max_num_seqs, made.compilation_config.max_cudagraph_capture_size
    options = [(each.max_cudagraph_capture_size, each.cudagraph_capture_sizes) for each in (args,
        args.compilation_config)]
    if not graphs or graphs >= most or any(size or sizes for size, sizes in options):  # no graphs at all: eager, CPUs
        return False
    args.max_cudagraph_capture_size = most
    return True


def merge_outputs(config: "VllmConfig") -> str:
    """Have vLLM's core send many tokens of a request at a time, unless the user names a scheduler. Returns why not,
    where this vLLM is another than `scheduler` was written for.
    """
    if config.scheduler_config.scheduler_cls is not None:
        return ""
    try:
        from rlhf_worker.engines import scheduler
    except Exception as error:  # whatever of its insides has moved
        return said(error)
    own = config.scheduler_config.get_scheduler_cls()
    if why := scheduler.misfit(own):
        return why
    config.scheduler_config.scheduler_cls = f"{scheduler.__name__}.{scheduler.MERGING[own].__name__}"
    return ""


def printed(most: int = 2000) -> str:
    """The end of what this Ray worker and its children wrote to stderr: why vLLM's own process ended stands nowhere
    else.
    """
    try:
        with Path("/proc/self/fd/2").readlink().open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - most))
            return log.read().decode(errors="replace")
    except OSError as error:
        return f"({error})"


def _worker_seat(worker: Any) -> Seat:
    """Runs in a vLLM worker process."""
    if worker.device.type == "cuda":
        import torch

        return Seat.of_uuid(str(torch.cuda.get_device_properties(worker.device).uuid))
    return Seat.here("cpu")


RemoteEngine = ray.remote(concurrency_groups=GROUPS)(Engine)
