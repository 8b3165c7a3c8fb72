"""Every wait of the driver follows from stallTimeoutSeconds, and ends before it."""

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

import rlhf_worker
from rlhf_api.job import STALL_TIMEOUT_SECONDS
from rlhf_worker.deadlines import collective_seconds, silent_seconds, sleep_seconds, work_seconds
from rlhf_worker.local import configure
from rlhf_worker.pod.job import stall_timeout
from tests.worker.configs import run_config

SAMPLE = Path(__file__).parents[2] / "manifests" / "samples" / "smollm2-colocated.yaml"
MACHINES_OWN = 600.0  # seconds: what does not depend on the model takes no longer


@pytest.mark.parametrize("stall", [60, 300, STALL_TIMEOUT_SECONDS, 86_400])
def test_who_waits_for_less_tells_before_who_waits_for_it(stall: int) -> None:
    config = run_config(runPolicy={"stallTimeoutSeconds": stall})
    silent, collective, work = silent_seconds(config), collective_seconds(config), work_seconds(config)
    assert 0 < silent < collective < work < stall and silent <= 300.0 and sleep_seconds(config) <= 300.0


def test_a_long_wait_is_written_in_one_place() -> None:
    """A constant of more than ten minutes would outlast a short stallTimeoutSeconds."""
    sources = Path(rlhf_worker.__file__).parent.rglob("*.py")
    constants = [node for file in sources for node in ast.parse(file.read_text()).body if isinstance(node, ast.Assign)]
    long = [ast.unparse(node) for node in constants if _seconds(node) > MACHINES_OWN]
    assert long == []


def _seconds(node: ast.Assign) -> float:
    name, value = ast.unparse(node.targets[0]), node.value
    if isinstance(value, ast.Constant) and isinstance(value.value, float) and ("SECONDS" in name or "DEADLINE" in name):
        return value.value
    return 0.0


def test_the_drivers_own_job_says_how_long() -> None:
    assert stall_timeout({}) == STALL_TIMEOUT_SECONDS
    assert stall_timeout({"spec": {"runPolicy": {"stallTimeoutSeconds": 300}}}) == 300


def test_a_run_by_hand_takes_it_from_its_manifest_and_an_older_image_is_not_told(tmp_path: Path) -> None:
    manifest: dict[str, Any] = yaml.safe_load(SAMPLE.read_text())
    manifest["spec"]["runPolicy"] = {"stallTimeoutSeconds": 300}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(manifest))
    config = configure(tmp_path / "job.yaml", {})
    assert config.stall_timeout_seconds == 300 and "stallTimeoutSeconds" not in config.dump()
    assert configure(tmp_path / "job.yaml", {}, steps=3).stall_timeout_seconds == 300
