"""Environments beside an engine: subprocesses that hold many episodes each, and can be killed with them.

An episode stays in the subprocess that reset it. A call that raises, hangs or kills its process fails the episode, which begins
again from its prompt; it never becomes a sample.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlhf_api.job import EnvironmentSpec
from rlhf_worker.errors import BadSpec, EnvironmentFailed
from rlhf_worker.experience import Sample
from rlhf_worker.rewards.attempt import Failure, finite
from rlhf_worker.rewards.pool import Child, LoadFailure
from rlhf_worker.rollout.episode import Episode, Request, Speech, Turn

FIELD = "rollout.environment"


class Seat:
    """One subprocess, started when it is needed, with a thread that talks to it: one call at a time."""

    def __init__(self, spec: EnvironmentSpec) -> None:
        self.spec = spec
        self.episodes = 0
        self.child: Child | None = None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="environment")

    def running(self) -> Child:
        """The subprocess, a new one if the last was killed. Raises Failure."""
        if self.child is None or not self.child.alive:
            self.child = Child()
            self.child.load(episodes=True, function=self.spec.function, code=self.spec.code, field=FIELD, kind="class", name="Environment")
        return self.child

    async def ask(self, child: Child | None, **call: Any) -> tuple[Child, dict[str, Any]]:
        """The answer of `child`, or of whichever runs. Raises Failure, also when that child is gone."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, self._ask, child, call)

    def _ask(self, child: Child | None, call: dict[str, Any]) -> tuple[Child, dict[str, Any]]:
        child = child or self.running()
        if not child.alive:
            raise Failure("its process was killed with another episode's call")
        return child, child.ask(call, self.spec.timeout_seconds)

    def close(self) -> None:
        if self.child is not None and self.child.alive:
            self.child.interrupt()
        self.thread.shutdown(wait=True, cancel_futures=True)
        if self.child is not None and self.child.alive:
            self.child.kill()


class Environments:
    """Plays episodes. Raises BadSpec at once when the class cannot be loaded."""

    def __init__(self, spec: EnvironmentSpec, speech: Speech) -> None:
        self.spec, self.speech = spec, speech
        self._numbers = itertools.count()
        self._seats = [Seat(spec) for _ in range(spec.workers)]
        try:
            self._seats[0].running()
            speech.observation("probe", -1)
        except BaseException as error:
            self.close()
            if isinstance(error, LoadFailure):
                raise BadSpec(f"{FIELD}.{'code' if spec.code is not None else 'function'} cannot be loaded: {error}") from None
            raise

    async def play(self, request: Request, turn: Callable[[Episode], Awaitable[Turn]]) -> Sample:
        """Turns and observations until the environment is done, the turns are used up, or the completion is cut. Raises EnvironmentFailed, or what `turn` raises."""
        reason = Failure("never tried")
        for _ in range(self.spec.retries + 1):
            try:
                return await self._episode(request, turn)
            except Failure as failure:
                reason = failure
        raise EnvironmentFailed(f"{FIELD} failed {self.spec.retries + 1} times on prompt {request.prompt.uid}: {reason}")

    async def _episode(self, request: Request, turn: Callable[[Episode], Awaitable[Turn]]) -> Sample:
        seat, number, episode, prompt = min(self._seats, key=lambda seat: seat.episodes), next(self._numbers), Episode(request), request.prompt
        seat.episodes += 1
        try:
            row = {**prompt.fields, "prompt": prompt.fields.get("prompt", prompt.text)}
            child, _ = await seat.ask(None, episode=number, action="reset", **row)
            over = False
            while not over:
                episode.add(await turn(episode))
                _, answer = await seat.ask(child, episode=number, action="step", completion=episode.last_turn(self.speech))
                over = self._over(episode, answer)
            with contextlib.suppress(Failure):  # what it did is done
                await seat.ask(child, episode=number, action="close")
            return episode.sample(self.speech)
        finally:
            seat.episodes -= 1

    def _over(self, episode: Episode, answer: dict[str, Any]) -> bool:
        """With the answer to the last turn in the episode. Also a turn that was cut gets its reward."""
        if answer["reward"] is not None:
            episode.reward = (episode.reward or 0.0) + finite(answer["reward"])
        if not (answer["done"] or episode.turns >= self.spec.max_turns or episode.finish_reason == "length"):
            episode.observe(self.speech.observation(answer["observation"], episode.token_ids[-1]))
        return bool(episode.finish_reason)

    def close(self) -> None:
        for seat in self._seats:
            seat.close()
