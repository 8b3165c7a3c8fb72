"""Which engines may serve: a state machine fed with what probes, restarts and syncs found. Pure: no clock, no Ray.

    stale -sync-> healthy <-answer/miss-> suspect -misses-> dead -restart-> restarting -started-> stale

An engine that starts, at first or again, holds the weights of the base model: it is stale until a whole sync has
reached it. """

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum


class Health(StrEnum):
    HEALTHY = "healthy"
    SUSPECT = "suspect"  # missed a probe, serves still
    DEAD = "dead"
    RESTARTING = "restarting"
    STALE = "stale"  # runs, and holds no version that may serve


class Event(StrEnum):
    ANSWERED = "answered"
    MISSED = "missed"  # a probe that did not come back in its time
    LOST = "lost"  # its process is gone, or says that it cannot go on
    RESTARTED = "restarted"  # its actor was created anew
    STARTED = "started"
    SYNCED = "synced"


class Outlook(StrEnum):
    GO = "go"
    WAIT = "wait"  # for engines that start
    STOP = "stop"  # too few are left, now and later


@dataclass(frozen=True, slots=True)
class EngineRecord:
    health: Health = Health.STALE
    misses: int = 0  # in a row
    restarts: int = 0  # since `forgiven_after` syncs went well
    syncs: int = 0  # in a row


@dataclass(frozen=True, slots=True)
class Limits:
    least: int  # engines that must serve
    misses: int = 3  # in a row, that make an engine dead
    restarts: int = 5  # of one engine
    forgiven_after: int = 20  # syncs, after which an engine's restarts count no more


def after(engine: EngineRecord, event: Event, limits: Limits) -> EngineRecord:
    """The engine after the event. One that says nothing new, or comes too late (the answer of an engine given up),
    changes nothing.
    """
    match engine.health, event:
        case Health.DEAD, Event.RESTARTED if engine.restarts < limits.restarts:
            return EngineRecord(Health.RESTARTING, restarts=engine.restarts + 1)
        case (Health.DEAD, _) | (
            Health.RESTARTING, Event.ANSWERED | Event.MISSED | Event.SYNCED,
        ) | (_, Event.RESTARTED):
            return engine
        case _, Event.LOST:
            return EngineRecord(Health.DEAD, restarts=engine.restarts)
        case Health.RESTARTING, Event.STARTED:
            return replace(engine, health=Health.STALE)
        case _, Event.MISSED if engine.misses + 1 >= limits.misses:
            return EngineRecord(Health.DEAD, restarts=engine.restarts)
        case health, Event.MISSED:
            return replace(
                engine, health=Health.SUSPECT if health is Health.HEALTHY else health, misses=engine.misses + 1,
            )
        case health, Event.ANSWERED:
            return replace(engine, health=Health.HEALTHY if health is Health.SUSPECT else health, misses=0)
        case _, Event.SYNCED:
            syncs = engine.syncs + 1
            return replace(
                engine, health=Health.HEALTHY, misses=0, syncs=syncs,
                restarts=0 if syncs >= limits.forgiven_after else engine.restarts,
            )
    return engine


def can_restart(engine: EngineRecord, limits: Limits) -> bool:
    return engine.health is Health.DEAD and engine.restarts < limits.restarts


def outlook(engines: Sequence[EngineRecord], limits: Limits) -> Outlook:
    """Whether enough serve; if not, whether enough still may."""
    serving = sum(e.health in (Health.HEALTHY, Health.SUSPECT) for e in engines)
    coming = sum(e.health in (Health.RESTARTING, Health.STALE) or can_restart(e, limits) for e in engines)
    return Outlook.GO if serving >= limits.least else Outlook.WAIT if serving + coming >= limits.least else Outlook.STOP


def amiss(engines: Sequence[EngineRecord]) -> str | None:
    """What is amiss, in words; None when nothing is."""
    faults = [
        f"engine {i} is {e.health}"
        for i, e in enumerate(engines)
        if e.health not in (Health.HEALTHY, Health.STALE) or (e.restarts and e.health is Health.STALE)
    ]
    return ", ".join(faults) or None
