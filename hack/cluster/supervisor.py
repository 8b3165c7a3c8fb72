"""The first process of the cluster's namespaces: prepares them, starts the parts, restarts what ends, reaps orphans.

Run as ``python -m hack.cluster.supervisor <state>`` under unshare(1). When it is killed the kernel ends every process
of its PID namespace, and with them go the mounts, the network and the pods.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LINK = "eth0"
_RESTART_DELAY = 1.0  # seconds
# The kubelet insists on these. They belong to the whole machine, so it is shown files that say what it wants.
_KERNEL_SETTINGS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}


@dataclass
class Part:
    """A component and its process. ``due`` is when it may be started next, by time.monotonic()."""

    name: str
    command: list[str]
    after: tuple[str, int] | None
    environment: dict[str, str]
    needs: str | None
    due: float = 0.0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)


def main(state: Path) -> None:
    plan: dict[str, Any] = json.loads((state / "plan.json").read_text())
    _mounts(state)
    _network(plan["node"], plan["host"])
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    parts = [_part(plain) for plain in plan["components"]]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # ends the namespace
    while True:
        for part in parts:
            _tend(part, state, plan["path"], plan["library_path"])
        _reap(parts)
        time.sleep(0.1)


def _part(plain: dict[str, Any]) -> Part:
    after = (str(plain["after"][0]), int(plain["after"][1])) if plain["after"] else None
    return Part(plain["name"], plain["command"], after, plain["environment"] or {}, plain["needs"])


def _mounts(state: Path) -> None:
    """Give the parts their own /run, /var/log and /var/lib entries: they write there, and nothing may stay behind."""
    # rlhf: where samples keep models and checkpoints
    _shadow(Path("/var/lib"), state / "var-lib", ("kubelet", "cni", "rlhf"))
    _run("mount", "-t", "tmpfs", "-o", "mode=755", "rlhf-cluster", "/run")
    _run("mount", "--bind", str(state / "var-log"), "/var/log")
    # Nobody answers for names here. The machine's own server, which the node does not reach, would be asked for 50 s
    # before an image that is missing is told. A link into /run dangles by now, which is as good.
    if (names := Path("/etc/resolv.conf")).exists():
        _run("mount", "--bind", str(state / "resolv.conf"), str(names))
    for name, value in _KERNEL_SETTINGS.items():
        shown = state / "kernel" / name
        shown.parent.mkdir(parents=True, exist_ok=True)
        shown.write_text(value + "\n")
        _run("mount", "--bind", str(shown), f"/proc/sys/{name}")
    # Pods' mounts must reach containers; unshare has cut the way to the machine. Last: what is shared while it is
    # bound to two places gets every later mount in both.
    _run("mount", "--make-rshared", "/")


def _shadow(directory: Path, private: Path, names: tuple[str, ...]) -> None:
    """Make ``names`` exist in ``directory`` for this mount namespace alone; every other entry stays what it is."""
    scratch = Path("/run")
    _run("mount", "-t", "tmpfs", "-o", "mode=755", "rlhf-cluster", str(scratch))
    for entry in os.scandir(directory):
        if entry.name in names or entry.is_symlink():
            continue
        target = scratch / entry.name
        target.mkdir() if entry.is_dir() else target.touch()
        _run("mount", "--rbind", entry.path, str(target))
    for name in names:
        (private / name).mkdir(parents=True, exist_ok=True)
        (scratch / name).mkdir()
        _run("mount", "--bind", str(private / name), str(scratch / name))
    _run("mount", "--rbind", str(scratch), str(directory))


def _network(node: str, host: str) -> None:
    _run("ip", "link", "set", "lo", "up")
    deadline = time.monotonic() + 30
    while not Path(f"/proc/sys/net/ipv4/conf/{LINK}").exists():
        if time.monotonic() > deadline:
            sys.exit("the link to the machine did not appear within 30 s")
        time.sleep(0.05)
    _run("ip", "address", "add", f"{node}/30", "dev", LINK)
    _run("ip", "link", "set", LINK, "up")
    # nothing is forwarded there; services need a route to be looked up
    _run("ip", "route", "add", "default", "via", host)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")


def _tend(part: Part, state: Path, path: str, library_path: str) -> None:
    if part.process is not None and part.process.returncode is None:
        return
    now = time.monotonic()
    if now < part.due or (part.needs and not Path(part.needs).exists()) or (part.after and not _listening(part.after)):
        return
    environment = dict(os.environ, PATH=path, LD_LIBRARY_PATH=library_path) | part.environment
    with (state / "log" / f"{part.name}.log").open("ab") as log:
        log.write(f"--- {time.strftime('%F %T')} {' '.join(part.command)}\n".encode())
        log.flush()
        part.process = subprocess.Popen(
            part.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd="/",
        )
    part.due = now + _RESTART_DELAY


def _listening(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=1).close()
    except OSError:
        return False
    return True


def _reap(parts: list[Part]) -> None:
    """Collect every ended child; orphans of containers come here too, because this is process 1."""
    ours = {part.process.pid: part for part in parts if part.process and part.process.returncode is None}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid in ours:
            process = ours[pid].process
            assert process is not None
            process.returncode = os.waitstatus_to_exitcode(status)
            print(
                f"{time.strftime('%F %T')} {ours[pid].name} ended with {process.returncode}; starting it again",
                flush=True,
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
