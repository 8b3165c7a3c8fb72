"""What the embedded cluster needs of the machine that it runs on."""

import os
import shutil
import subprocess
import sys

UNSHARE = [
    "unshare",
    "--net",
    "--pid",
    "--mount",
    "--uts",
    "--ipc",
    "--fork",
    "--kill-child=KILL",
    "--mount-proc",
    "--propagation",
    "slave",
]


def missing() -> list[str]:
    """What this machine lacks, in words."""
    found = []
    if sys.platform != "linux":
        found.append("Linux")
    elif os.geteuid() != 0:
        found.append("root")
    found += [f"the program `{name}`" for name in ("unshare", "nsenter", "ip", "mount") if not shutil.which(name)]
    if not found and subprocess.run(
        [*UNSHARE, "mount", "--make-rshared", "/"], capture_output=True, check=False,
    ).returncode != 0:
        found.append("the right to make namespaces and mounts (CAP_SYS_ADMIN)")
    if not found and not os.access("/sys/fs/cgroup", os.W_OK):
        found.append("a writable /sys/fs/cgroup")
    return found
