"""How many groups may be under way, and which a step trains: the bound on staleness. Pure.

A group is `samplesPerPrompt` completions of one prompt. With B groups a step and v finished steps, admission keeps

    in flight + finished <= (v + staleness + 1) * B - consumed        (AReaL, arXiv 2505.24298)

and a step takes every group that could not wait for the next one. Both together mean that no group is trained more than
`staleness` steps after its first token, and that none is thrown away for its age.

With over-sampling `ahead` more may be in flight, of which a step takes those that finish first, whatever their age:
what is left goes on in the next step (partial rollouts: Kimi k1.5, arXiv 2501.12599; APRIL, arXiv 2509.18521).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rlhf_api.job import EvaluationSpec
from rlhf_worker.experience import Prompt, Sample, ScoredSample


@dataclass(slots=True, eq=False)
class Group:
    """One prompt on its way from the data to a step, or to an evaluation.

    `born`: steps that were finished when its generation began; `failed`: how often a sample of it had no value;
    `drawn`: its completions, None or what there is of it where one is missing; `tried`: engines that failed it.
    """

    prompt: Prompt
    born: int
    evaluation: EvaluationSpec | None = None
    drawn: list[Sample | None] = field(default_factory=list)
    samples: list[ScoredSample] = field(default_factory=list)
    failed: int = 0
    tried: set[Any] = field(default_factory=set)

    @property
    def missing(self) -> list[int]:
        """Numbers of the completions that are still to be drawn, from the start or on."""
        return [index for index, sample in enumerate(self.drawn) if sample is None or not sample.finished]


class Admission:
    """Between the data and the steps: groups in flight, finished groups, and how many more may begin.

    `steps`: of the whole run, past which no group is needed. `rounds`: with dynamic sampling a step may cost at most
    rounds * batch groups; past that, uninformative ones are kept. """

    def __init__(
        self, batch: int, staleness: int, steps: int, *, rounds: int = 1, step: int = 0, ahead: int = 0
    ) -> None:
        self.batch, self.staleness, self.steps, self.rounds, self.ahead = batch, staleness, steps, rounds, ahead
        self.version = step
        self.consumed = step * batch
        self.dropped = 0  # since the last step was taken
        self._under_way: list[Group] = []  # in the order of their admission
        self._ready: set[Group] = set()

    @property
    def room(self) -> int:
        """Groups that may begin now."""
        most = min((self.version + self.staleness + 1) * self.batch + self.ahead, self.steps * self.batch)
        return most - self.consumed - len(self._under_way)

    @property
    def open(self) -> list[Group]:
        """Groups that are not finished, in the order of their begin."""
        return [group for group in self._under_way if group not in self._ready]

    @property
    def idle(self) -> bool:
        """Nothing is in flight."""
        return len(self._ready) == len(self._under_way)

    def admit(self, prompts: Iterable[Prompt]) -> list[Group]:
        """Groups of these prompts, at most `room`."""
        begun = [Group(prompt, self.version) for prompt in prompts]
        if len(begun) > self.room:
            raise ValueError(f"{len(begun)} groups do not fit into a room of {self.room}")
        self._under_way += begun
        return begun

    def finish(self, group: Group, *, informative: bool) -> None:
        """Its samples are scored. One that teaches nothing is dropped, which makes room for another, while the rounds
        last.
        """
        if informative or self.dropped >= (self.rounds - 1) * self.batch:
            self._ready.add(group)
        else:
            self.dropped += 1
            self._under_way.remove(group)

    def leave_out(self, group: Group) -> None:
        """It cannot be finished, which makes room for another."""
        self._under_way.remove(group)

    @property
    def complete(self) -> bool:
        """Whether a step can be taken: enough groups are finished, and it would leave none behind for too long."""
        taken = set(self._next())
        left = [group for group in self._under_way if group not in taken]
        return len(taken) == self.batch and (self.ahead > 0 or not self._too_late(left))

    def take(self) -> list[Group]:
        """The groups of the next step, the oldest finished first. Only when `complete`."""
        taken = self._next()
        chosen = set(taken)
        self._ready -= chosen
        self._under_way = [group for group in self._under_way if group not in chosen]
        self.consumed += self.batch
        self.dropped = 0
        return taken

    def _next(self) -> list[Group]:
        return [group for group in self._under_way if group in self._ready][: self.batch]

    def _too_late(self, left: list[Group]) -> bool:
        """Whether the steps to come, of `batch` groups each, cannot train all of `left` in time."""
        late = self.version - self.staleness
        return any(
            sum(group.born <= late + steps for group in left) > steps * self.batch
            for steps in range(self.staleness + 1)
        )

    def advance(self, step: int) -> None:
        """`step` steps are finished and the engines hold their weights."""
        self.version = step

    def pending(self) -> list[str]:
        """Uids of the prompts that were drawn and not trained: what a resumed run generates first."""
        return [group.prompt.uid for group in self._under_way]
