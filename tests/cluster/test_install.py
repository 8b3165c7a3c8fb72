"""The chart on the real API server, by the real Helm."""

import subprocess

import pytest

from hack.kubectl import OPERATOR_NAMESPACE, Kube

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def test_helms_test_passes_beside_a_policy_that_lets_it_in(operator: Kube) -> None:
    command = [operator.helm, "test", "rlhf-operator", "--namespace", OPERATOR_NAMESPACE, "--logs", "--timeout", "2m"]
    done = subprocess.run(command, env=operator.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ready, and one replica leads" in done.stdout
    operator.run("delete", "pod", "rlhf-operator-test", "-n", OPERATOR_NAMESPACE, "--wait=false")
