"""kubectl and helm against one cluster: what the demo, the benchmarks and the cluster tests share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

from hack.cluster import settings

OPERATOR_NAMESPACE = "rlhf-system"

Object = dict[str, Any]


class Refused(Exception):
    """kubectl ended with an error; the text is what it said."""


@dataclass(frozen=True)
class Kube:
    """kubectl and helm against one cluster."""

    kubectl: str
    helm: str
    environment: dict[str, str]

    def run(self, *arguments: str, text: str | None = None) -> str:
        """Standard output of kubectl; `text` is its standard input. Raises Refused with its words."""
        done = subprocess.run(
            [self.kubectl, *arguments], env=self.environment, check=False, capture_output=True, text=True, input=text,
        )
        if done.returncode != 0:
            raise Refused(done.stderr.strip())
        return done.stdout

    def apply(self, body: Object, *arguments: str) -> None:
        self.run("apply", "-f", "-", *arguments, text=json.dumps(body))

    def find(self, *arguments: str) -> Object | None:
        done = subprocess.run(
            [self.kubectl, "get", *arguments, "-o", "json"], env=self.environment, check=False, capture_output=True,
            text=True,
        )
        return json.loads(done.stdout) if done.returncode == 0 else None

    def install_operator(self) -> None:
        command = [
            self.helm, "upgrade", "--install", "rlhf-operator", "charts/rlhf-operator", "--namespace",
            OPERATOR_NAMESPACE, "--create-namespace", "--set", "image.repository=rlhf-operator,image.tag=dev", "--wait",
            "--timeout", "3m",
        ]
        subprocess.run(command, env=self.environment, check=True, stdout=subprocess.DEVNULL)


def kube(cfg: settings.Settings) -> Kube:
    """The tools and the kubeconfig of this clone's cluster, or, with CLUSTER=current, the machine's own."""
    ours = os.environ.get("CLUSTER", "embedded") != "current"
    path = f"{cfg.bin}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **({"KUBECONFIG": str(cfg.kubeconfig)} if ours else {})}
    return Kube(shutil.which("kubectl", path=path) or "kubectl", shutil.which("helm", path=path) or "helm", environment)
