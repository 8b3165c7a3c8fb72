"""Flags of `python -m rlhf_operator`, and the settings of kopf."""

import argparse
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kopf

from rlhf_api.progress import HEARTBEAT_SECONDS
from rlhf_operator.names import JOB_LABEL
from rlhf_operator.presets import NO_PRESETS, InvalidPresets, Presets, read

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True, slots=True)
class Settings:
    """`namespace` None watches all of them. `lease_namespace` None does without an election."""

    namespace: str | None
    kubeconfig: str | None
    health_port: int
    lease_namespace: str | None
    verbose: bool
    presets: Path | None = None


# An object may be nested 10,000 levels deep, as far as the API server cares; a watch event wraps it. python counts each
# level that its json reads as a call, and needs some hundreds of bytes of stack for it.
LEVELS_MAX, STACK_BYTES = 12_000, 64 * 2**20


def parse(argv: Sequence[str]) -> Settings:
    """Raises SystemExit with a message, as argparse does."""
    parser = argparse.ArgumentParser(prog="rlhf_operator", description="Runs RLHFJobs on KubeRay.")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--namespace", help="the one namespace to serve; a Role is enough")
    where.add_argument("--all-namespaces", action="store_true", help="serve every namespace (the default)")
    parser.add_argument("--kubeconfig", help="default: the pod's ServiceAccount, else $KUBECONFIG, else ~/.kube/config")
    parser.add_argument("--health-port", type=int, default=8080, help="/livez, /readyz and /metrics; 0 takes a free "
        "port")
    parser.add_argument("--no-leader-election", action="store_true", help="serve at once: only where no second "
        "operator can run")
    parser.add_argument("--lease-namespace", help="where the Lease rlhf-operator lies; default: the operator's own "
        "namespace, else --namespace, else default")
    parser.add_argument("--presets", type=Path, help="a YAML file of what every job inherits and may override: image, "
        "and pods as in a job")
    parser.add_argument("--verbose", action="store_true", help="log debug messages")
    args = parser.parse_args(argv)
    lease = None if args.no_leader_election else args.lease_namespace or own_namespace() or args.namespace or "default"
    return Settings(args.namespace, args.kubeconfig, args.health_port, lease, args.verbose, args.presets)


def read_presets(path: Path | None) -> Presets:
    """Raises InvalidPresets, also for a file that cannot be read, with its name."""
    try:
        return read(path.read_text()) if path else NO_PRESETS
    except OSError as error:
        raise InvalidPresets(f"--presets {path}: {error.strerror}") from None
    except InvalidPresets as error:
        raise InvalidPresets(f"--presets {path}: {error}") from None


def own_namespace() -> str | None:
    """Of the pod that we run in; None outside a cluster."""
    named = os.environ.get("POD_NAMESPACE")
    return named or (NAMESPACE_FILE.read_text().strip() if NAMESPACE_FILE.exists() else None)


class Backoffs:
    """Seconds between the tries of one request, without end: an API server may be away for long. A 429 may ask for
    more."""

    def __iter__(self) -> Iterator[float]:
        yield from (0.5, 1.0, 2.0)
        while True:
            yield random.uniform(2.0, 5.0)


class NoDiffs(kopf.DiffBaseStorage):
    """kopf copies each object several times to compare it with what it last handled. It handles nothing here."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> Any:
        return None

    def store(self, **_: Any) -> None:
        """Only handlers of changes have something to store."""


class NoProgress(kopf.ProgressStorage):
    """The same for the progress of handlers."""

    def fetch(self, **_: Any) -> Any:
        return None

    def store(self, **_: Any) -> None:
        """Only handlers of changes have progress."""

    def purge(self, **_: Any) -> None:
        """There is none."""

    def touch(self, **_: Any) -> None:
        """There is none."""

    def clear(self, *, essence: Any) -> Any:
        return essence


def kopf_settings(namespace: str | None) -> kopf.OperatorSettings:
    """An informer and nothing else: no Events from logs, no peering, only labelled pods and RayClusters, only Warning
    Events.

    A watch that is silent for 70 s is begun anew: the API server sends a bookmark every minute. Server errors, 403
    and 429 are tried again without end, 410 lists anew; what else kopf takes for fatal ends it, and
    `handlers.Informer` begins it anew."""
    settings = kopf.OperatorSettings()
    # A Role cannot grant the lists of CRDs and namespaces; asking all the same holds every watch back for a minute.
    settings.scanning.disabled = namespace is not None
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.watching.server_timeout = 240
    settings.watching.client_timeout = 300
    settings.watching.connect_timeout = 5
    settings.watching.inactivity_timeout = 70
    settings.watching.chunk_size = 200
    settings.watching.label_selectors["pods"] = JOB_LABEL
    settings.watching.label_selectors["ray.io", "rayclusters"] = JOB_LABEL
    settings.watching.field_selectors["events"] = "type=Warning"
    settings.networking.request_timeout = 30
    settings.networking.error_backoffs = Backoffs()
    settings.persistence.diffbase_storage = NoDiffs()
    settings.persistence.progress_storage = NoProgress()
    # Longer than from one report of a driver to the next: a worker that waits is cheaper than a new one.
    settings.queueing.idle_timeout = 1.5 * HEARTBEAT_SECONDS
    settings.process.ultimate_exiting_timeout = None
    return settings
