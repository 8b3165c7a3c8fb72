"""Flags of `python -m rlhf_operator`, and the settings of kopf."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import kopf

from rlhf_operator.names import JOB_LABEL

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True, slots=True)
class Settings:
    """`namespace` None watches all of them. `lease_namespace` None does without an election."""

    namespace: str | None
    kubeconfig: str | None
    health_port: int
    lease_namespace: str | None
    verbose: bool


def parse(argv: Sequence[str]) -> Settings:
    """Raises SystemExit with a message, as argparse does."""
    parser = argparse.ArgumentParser(prog="rlhf_operator", description="Runs RLHFJobs on KubeRay.")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--namespace", help="the one namespace to serve; a Role is enough")
    where.add_argument("--all-namespaces", action="store_true", help="serve every namespace (the default)")
    parser.add_argument("--kubeconfig", help="default: the pod's ServiceAccount, else $KUBECONFIG, else ~/.kube/config")
    parser.add_argument("--health-port", type=int, default=8080, help="/livez, /readyz and /metrics; 0 takes a free port")
    parser.add_argument("--no-leader-election", action="store_true", help="serve at once: only where no second operator can run")
    parser.add_argument("--lease-namespace", help="where the Lease rlhf-operator lies; default: the operator's own namespace, else --namespace, else default")
    parser.add_argument("--verbose", action="store_true", help="log debug messages")
    args = parser.parse_args(argv)
    lease = None if args.no_leader_election else args.lease_namespace or own_namespace() or args.namespace or "default"
    return Settings(args.namespace, args.kubeconfig, args.health_port, lease, args.verbose)


def own_namespace() -> str | None:
    """Of the pod that we run in; None outside a cluster."""
    named = os.environ.get("POD_NAMESPACE")
    return named or (NAMESPACE_FILE.read_text().strip() if NAMESPACE_FILE.exists() else None)


def kopf_settings(namespace: str | None) -> kopf.OperatorSettings:
    """An informer and nothing else: no Events from logs, no peering, only labelled pods and RayClusters."""
    settings = kopf.OperatorSettings()
    # A Role cannot grant the lists of CRDs and namespaces; asking all the same holds every watch back for a minute.
    settings.scanning.disabled = namespace is not None
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.watching.server_timeout = 240
    settings.watching.client_timeout = 300
    settings.watching.connect_timeout = 5
    settings.watching.chunk_size = 500
    settings.watching.label_selectors["pods"] = JOB_LABEL
    settings.watching.label_selectors["ray.io", "rayclusters"] = JOB_LABEL
    settings.networking.request_timeout = 30
    settings.process.ultimate_exiting_timeout = 20
    return settings
