"""The engines of a run: a thread probes them and starts dead ones anew; the loop's own thread takes them back, with a
whole sync.

`serving` are those that may be asked for completions. Only the loop's thread changes it: whoever waits for a dead
engine gets Ray's RayActorError, and tells it here by `lost`. Engines that sleep serve nothing; a whole sync wakes them.
What the fleet answers in which state of its engines is a table in docs/rollouts.md.
"""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

from rlhf_worker.calls import SLICE_SECONDS, answering, ended_badly, gather, root_cause
from rlhf_worker.engines.ledger import EngineRecord, Event, Health, Limits, Outlook, after, amiss, can_restart, outlook
from rlhf_worker.errors import DeadlineExceeded, EnginesLost, LinkBroken
from rlhf_worker.stop import interrupt_if_asked
from rlhf_worker.weights.sync import Synced, WeightSync

PROBE_SECONDS = 2.0  # between two probes
ANSWER_SECONDS = 10.0  # for one: the engine's event loop is busy at times
LOAD_SECONDS = 2.0  # for what is of no use to the run itself
AFTER_FAILED_SYNC_SECONDS = 30.0  # for an answer of the engine's workers
RUNNING = (Health.HEALTHY, Health.SUSPECT, Health.STALE)

Spawn = Callable[[int], tuple[ActorHandle, Any]]  # engine's number -> its new actor, and the call that starts it


class Fleet:
    def __init__(
        self, actors: Sequence[ActorHandle], sync: WeightSync, spawn: Spawn, tell: Callable[[str | None], None],
        *, least: int, slots: int, start_seconds: float, sleep_seconds: float,
    ) -> None:  # fmt: skip
        """actors: started, by number; sync: connected to all; tell: takes what is amiss, None when nothing is; slots:
        completions that an engine computes at once.
        """
        self.actors = list(actors)
        self.serving: list[ActorHandle] = []
        self.weights, self.slots = sync, slots
        self._spawn, self._tell = spawn, tell
        self._limits, self._start_seconds, self._sleep_seconds = Limits(least=least), start_seconds, sleep_seconds
        self._engines = [EngineRecord() for _ in actors]
        self._reasons: dict[int, str] = {}  # why an engine died last
        self._starting: dict[int, tuple[Any, float]] = {}  # the call, and until when it may take
        self._asleep = False  # the engines' memory is the trainer's: none is started into it
        self._lock, self._spawning, self._closing = threading.Lock(), threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="engines", daemon=True)
        self._thread.start()

    def health(self) -> list[Health]:
        with self._lock:
            return [engine.health for engine in self._engines]

    def lost(self, actor: ActorHandle) -> None:
        """Its calls end with RayActorError, or never: it serves no more, and the thread starts it anew."""
        self.serving = [one for one in self.serving if one != actor]
        with self._spawning:
            if actor in self.actors:  # and was not replaced meanwhile
                self._note(self.actors.index(actor), Event.LOST)

    def sleep(self) -> None:
        """All that run, or start, lend their memory to the trainer, and serve nothing until the next sync.

        One that died or hangs is lost. Raises what `gather` does when no death explains it.
        """
        with self._spawning:
            self._asleep = True
        while Health.RESTARTING in self.health():  # it takes its memory now, and can lend it when it has
            _moment()
        running, errors = self._running(), []
        for answer in [actor.sleep.remote() for actor in running]:
            try:
                gather([answer], self._sleep_seconds, "sleep of the engines")
            except (DeadlineExceeded, RayActorError, RayTaskError) as error:
                errors.append(error)
        if errors and not self._found_dead(running):
            raise errors[0]
        self.serving = []

    def loads(self) -> list[dict[int, float]]:
        """Of each engine that answers, seconds by the number of its sequences, since it was last asked."""
        asked = [actor.load.remote() for actor in self._running()]
        done, _ = ray.wait(asked, num_returns=len(asked), timeout=LOAD_SECONDS) if asked else ([], [])
        return [ray.get(one) for one in done if not ended_badly(one)]

    def sync(self, *, prove: bool) -> Synced:
        """Started engines come back, those asleep wake, and all that serve afterwards hold the policy's weights, whole.

        One that died or hangs is left out. Waits while none runs. Raises EnginesLost, and what WeightSync does when no
        death explains it.
        """
        self._asleep = False
        while True:
            while not set(RUNNING) & set(self.health()):
                self._wait()
            self.weights.engines = running = self._running()
            try:
                synced = self.weights(prove=prove)
                break
            except (DeadlineExceeded, LinkBroken, RayActorError, RayTaskError) as error:
                if not self._found_dead(running):
                    raise
                words = "weight sync: going on without the engines that are lost"
                print(f"{words}: {root_cause(error)}", file=sys.stderr, flush=True)
        reached = [(number, actor) for number, actor in enumerate(list(self.actors)) if actor in running]
        # One that was found dead meanwhile stays so.
        self.serving = [actor for number, actor in reached if self._note(number, Event.SYNCED) in RUNNING]
        return synced

    def _running(self) -> list[ActorHandle]:
        return [actor for actor, health in zip(list(self.actors), self.health(), strict=True) if health in RUNNING]

    def _found_dead(self, asked: Sequence[ActorHandle]) -> bool:
        """Whether one is, or its workers do not answer any more: both are the same to a sync."""
        alive = answering(asked, "alive", deadline_seconds=AFTER_FAILED_SYNC_SECONDS)
        dead = [actor for actor in asked if actor not in alive]
        for actor in dead:
            self.lost(actor)
        return bool(dead)

    @property
    def short(self) -> bool:
        """Fewer serve than spec.rollout.minEngines. Those that sleep are not missed: who wants them wakes them."""
        return not self._asleep and self._outlook() is not Outlook.GO

    def ensure(self) -> None:
        """Returns when enough serve: those that sleep or start have got the weights then. Raises EnginesLost."""
        if not self.serving:
            self.sync(prove=False)
        while self._outlook() is not Outlook.GO:
            self._wait()
            if Health.STALE in self.health():
                self.sync(prove=False)

    def _wait(self) -> None:
        """A moment, while engines start."""
        if self._outlook() is Outlook.STOP:
            raise EnginesLost(
                f"fewer than spec.rollout.minEngines ({self._limits.least}) engines are left, and restarts "
                    "did not help: "
                f"{amiss(self._engines)}; {'; '.join(self._reasons.values())}"
            )
        _moment()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(ANSWER_SECONDS + PROBE_SECONDS)
        self.serving = self._running()  # also those that sleep are there to be closed

    def _outlook(self) -> Outlook:
        with self._lock:
            return outlook(self._engines, self._limits)

    def _note(self, number: int, event: Event) -> Health:
        with self._lock:
            before, self._engines[number] = self._engines[number], after(self._engines[number], event, self._limits)
            now, words = self._engines[number], amiss(self._engines)
        if now.health is not before.health:
            print(f"engine {number}: {before.health} -> {now.health} ({event})", file=sys.stderr, flush=True)
            self._tell(words)
        return now.health

    def _watch(self) -> None:
        while not self._closing.wait(PROBE_SECONDS):
            try:
                self._probe()
                self._restart()
            except Exception as error:  # a Ray that goes away ends the driver elsewhere; a probe must not
                print(f"engines could not be watched: {error}", file=sys.stderr, flush=True)

    def _probe(self) -> None:
        asked = {i: self.actors[i].ping.remote() for i, health in enumerate(self.health()) if health in RUNNING}
        if not asked:
            return
        done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_SECONDS)
        for number, answer in asked.items():
            event = Event.MISSED if answer not in done else Event.LOST if self._failed(
                number, answer,
            ) else Event.ANSWERED
            if self._note(number, event) is Health.DEAD:
                ray.kill(self.actors[number])  # who waits for it hears of it now

    def _restart(self) -> None:
        for number in range(len(self._engines)):
            with self._spawning:  # or those asleep would lend the memory that it is about to take
                if can_restart(self._engines[number], self._limits) and not (self._asleep or self._closing.is_set()):
                    ray.kill(self.actors[number])
                    self.actors[number], call = self._spawn(number)
                    self._starting[number] = (call, time.monotonic() + self._start_seconds)
                    self._note(number, Event.RESTARTED)  # only now: until then the old one's death may be told
        for number, (call, end) in list(self._starting.items()):
            late = time.monotonic() > end
            if late or ray.wait([call], timeout=0)[0]:
                del self._starting[number]
                event = Event.LOST if late or self._failed(number, call) else Event.STARTED
                if self._note(number, event) is Health.DEAD:
                    ray.kill(self.actors[number])  # it may hold memory, and load on

    def _failed(self, number: int, call: Any) -> bool:
        """Whether a call that has ended, ended with an error, which is kept for the run's last words."""
        try:
            ray.get(call)
        except RayError as error:
            self._reasons[number] = f"engine {number}: {root_cause(error)}"
            return True
        return False


def _moment() -> None:
    interrupt_if_asked()
    time.sleep(SLICE_SECONDS)
