"""The cluster's cgroups: one directory below the root of each hierarchy (v1), or of the only one (v2)."""

from __future__ import annotations

import os
from pathlib import Path

from hack.cluster.steps import wait_for

BASE = Path("/sys/fs/cgroup")


def make(name: str) -> None:
    """Make the directories that the kubelet works below; on v2 with every controller handed on to what is in them."""
    for root in _roots():
        (root / name).mkdir(exist_ok=True)
        if root == BASE:
            for directory in (root, root / name):
                enabled = " ".join(
                    f"+{controller}" for controller in (directory / "cgroup.controllers").read_text().split()
                )
                (directory / "cgroup.subtree_control").write_text(enabled)


def remove(name: str) -> None:
    """Remove the directories, innermost first. Raises ClusterError while processes are left in them."""

    def gone() -> bool:
        for root in _roots():
            for path, _, _ in os.walk(root / name, topdown=False):
                try:
                    Path(path).rmdir()
                except OSError:
                    return False  # its last process is still ending
        return True

    wait_for("the removal of the cgroups", gone, 30, f"look for processes in {BASE}/*/{name}")


def _roots() -> list[Path]:
    if (BASE / "cgroup.controllers").exists():
        return [BASE]
    return [path for path in BASE.iterdir() if path.is_dir() and not path.is_symlink()]
