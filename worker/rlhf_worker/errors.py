"""How a run ends when its input is wrong. Everything else is retried by the kubelet in place."""


class BadSpec(Exception):
    """The spec is wrong (exit 64, never retried). The message names the field and the fix."""


class BadData(Exception):
    """Data or a checkpoint is wrong (exit 65, never retried). The message names the place and the fix."""
