"""Environments beside an engine: subprocesses that hold many episodes each, and can be killed with them.

An episode stays in the subprocess that reset it. A call that raises, hangs or kills its process fails the episode,
which begins again from its prompt; it never becomes a sample. """

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import Any

from rlhf_api.job import EnvironmentSpec, PromptsSpec
from rlhf_api.run import RunConfig
from rlhf_worker.errors import BadSpec, EnvironmentFailed
from rlhf_worker.experience import NO_TOKENS, Sample
from rlhf_worker.rewards.attempt import Failure, finite, tried
from rlhf_worker.rewards.pool import Child
from rlhf_worker.rollout.episode import Episode, Request, Speech, Turn
from rlhf_worker.template import Unfit

FIELD = "rollout.environment"


class EnvironmentProcess:
    """One subprocess, with a thread that talks to it."""

    def __init__(self, spec: EnvironmentSpec, field: str) -> None:
        self.episodes = 0
        self.child = Child(
            episodes=True, function=spec.function, code=spec.code, field=field, kind="class", name="Environment"
        )
        self._seconds = spec.timeout_seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="environment")

    async def ask(self, **call: Any) -> dict[str, Any]:
        """Raises Failure."""
        loop = asyncio.get_running_loop()
        answer: dict[str, Any] = await loop.run_in_executor(self._thread, self.child.ask, call, self._seconds)
        return answer

    def close(self) -> None:
        self.child.close()
        self._thread.shutdown(wait=True, cancel_futures=True)


class Environments:
    """Plays episodes. Raises BadSpec at once when the class cannot be loaded."""

    def __init__(self, spec: EnvironmentSpec, speech: Speech, field: str = FIELD) -> None:
        self.spec, self.speech, self.field = spec, speech, field
        self._numbers = itertools.count()
        self._processes = [EnvironmentProcess(spec, field) for _ in range(spec.workers)]
        try:
            self._processes[0].child.load()
            self._check()
        except BaseException:
            self.close()
            raise

    def speaking(self, speech: Speech, field: str) -> "Environments":
        """The same subprocesses, for prompts that are rendered in another way. Raises BadSpec."""
        other = copy(self)
        other.speech, other.field = speech, field
        other._check()
        return other

    def _check(self) -> None:
        try:
            self.speech.observation("probe", -1)
        except Unfit as error:
            raise BadSpec(f"{self.field}: no observation can be rendered: {error}") from None

    async def play(self, request: Request, turn: Callable[[Episode], Awaitable[Turn]]) -> Sample:
        """Turns and observations until the environment is done, the turns are used up, or the completion is cut.

        Raises EnvironmentFailed, unless onFailure is redraw: then the sample is empty but for its failure. Raises what
        `turn` raises.
        """
        try:
            return await tried(self.spec.retries, lambda _: self._episode(request, turn))
        except Failure as reason:
            words = f"{self.field} failed {self.spec.retries + 1} times on prompt {request.prompt.uid}: {reason}"
        if self.spec.on_failure == "stop":
            raise EnvironmentFailed(words)
        return Sample(prompt=request.prompt, text="", finish_reason="stop", failure=words, **NO_TOKENS)

    async def _episode(self, request: Request, turn: Callable[[Episode], Awaitable[Turn]]) -> Sample:
        process = min(self._processes, key=lambda process: process.episodes)
        number, episode, prompt = next(self._numbers), Episode(request), request.prompt
        process.episodes += 1
        try:
            row = {**prompt.fields, "prompt": prompt.fields.get("prompt", prompt.text)}
            await process.ask(episode=number, action="reset", arguments=row)
            over = False
            while not over:
                episode.add(await turn(episode))
                said = {"completion": episode.last_turn(self.speech)}
                over = self._over(episode, await process.ask(episode=number, action="step", arguments=said))
            with contextlib.suppress(Failure):  # what it did is done
                await process.ask(episode=number, action="close")
            return episode.sample(self.speech)
        finally:
            process.episodes -= 1

    def _over(self, episode: Episode, answer: dict[str, Any]) -> bool:
        """With the answer to the last turn in the episode. Also a turn that was cut gets its reward."""
        if answer["reward"] is not None:
            episode.reward = (episode.reward or 0.0) + finite(answer["reward"])
        if not (answer["done"] or episode.turns >= self.spec.max_turns or episode.finish_reason == "length"):
            try:
                episode.observe(self.speech.observation(answer["observation"], episode.token_ids[-1]))
            except Unfit as reason:
                raise Failure(f"its observation {answer['observation']!r:.200}: {reason}") from None
        return bool(episode.finish_reason)

    def close(self) -> None:
        for process in self._processes:
            process.close()


def opened(config: RunConfig, tokenizer: Any) -> dict[str, Environments]:
    """The run's own by "", and by the name of an evaluation set what plays it: its own environment, or the run's, with
    observations as the set's data renders them. Raises BadSpec.
    """
    environments: dict[str, Environments] = {}
    if run := config.rollout.environment:
        environments[""] = Environments(run, Speech.of(tokenizer, config))
    for spec in config.evaluation:
        field = f"evaluation[{spec.name}]"
        if spec.environment or run:
            speech = _speech(tokenizer, config, spec.data, field)
            environments[spec.name] = (
                Environments(spec.environment, speech, f"{field}.environment") if spec.environment
                else environments[""].speaking(speech, field)
            )
    return environments


def _speech(tokenizer: Any, config: RunConfig, data: PromptsSpec, field: str) -> Speech:
    try:
        return Speech.of(tokenizer, config, data)
    except BadSpec as error:
        raise BadSpec(f"{field}: {error}") from None
