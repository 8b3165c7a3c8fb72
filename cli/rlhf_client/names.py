"""What the operator names things by (rlhf_operator.names, which a test compares)."""

from rlhf_api import GROUP

JOB_LABEL, ROLE_LABEL = f"{GROUP}/job", f"{GROUP}/role"
HEAD, TRAINER = "head", "trainer"
DRIVER, RAY = "driver", "ray"  # containers


def run_config(job: str) -> str:
    return f"{job}-run"


def claim(job: str) -> str:
    return f"{job}-checkpoints"


def files(job: str) -> str:
    """The ConfigMap of a user's files, which this client makes."""
    return f"{job}-files"
