"""What a container of the embedded cluster sees: this machine's programs and Python, read-only, in a tiny root.

The binds are part of the container runtime's base specification, so pod manifests name no host path and are the same
on a real cluster, where the images carry the same things. One bind is writable, as a cache volume that a platform gives
to its jobs: what vLLM found out about a model's class, which costs each new pod 10 s of a core.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from hack.cluster import settings as s
from rlhf_worker.watcher import HOOK

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_SETTINGS = ("/etc/alternatives", "/etc/ld.so.cache", "/etc/ssl")  # what programs under /usr refer to
PODS_CACHE = "/var/cache/pods"
_DIRECTORIES = ("dev", "etc", "proc", "root", "run", "sys", "tmp", "var/tmp", "home")
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/:/bin/false\n"
    "rlhf:x:65532:65532:rlhf:/tmp:/bin/false\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\nrlhf:x:65532:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "etc/services": "",
}


@dataclass(frozen=True)
class Image:
    """A one-layer image. ``files`` maps a path in it to the file of this machine that becomes its content."""

    name: str
    entrypoint: list[str]
    environment: dict[str, str]
    user: str = ""
    files: dict[str, Path] = field(default_factory=dict)


def images(cfg: s.Settings) -> list[Image]:
    environment = {
        "PATH": f"{cfg.venv}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "VIRTUAL_ENV": str(cfg.venv),
        "HOME": "/tmp",  # of whatever user: nothing else of the root is writable
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",  # the installation is read-only
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": f"{PODS_CACHE}/vllm",
    }
    return [
        Image(s.PAUSE_IMAGE, ["/pause"], {}, user="65534", files={"pause": (cfg.bin / "pause").resolve()}),
        Image(s.OPERATOR_IMAGE, ["python", "-m", "rlhf_operator"], environment, user="65532"),
        Image(s.WORKER_IMAGE, [], environment | HOOK, user="65532"),
    ]


def read_only_binds(cfg: s.Settings) -> list[tuple[str, str]]:
    """(source, destination) of every bind: system directories, the Python of the environment, the clone's packages."""
    system = [(path, path) for path in (*_SYSTEM, *_SETTINGS) if Path(path).exists() and not Path(path).is_symlink()]
    python = [(str(path.resolve()), str(path)) for path in _python_homes(cfg.venv) if not path.is_relative_to("/usr")]
    clone = [cfg.venv, *(cfg.clone / name for name in s.CLONE_DIRECTORIES)]
    return system + python + [(str(path), str(path)) for path in clone if path.is_dir()]


def _python_homes(venv: Path) -> list[Path]:
    """Prefixes of the interpreter that the environment was made from: as its pyvenv.cfg names it, and as it really is.
    """
    lines = (venv / "pyvenv.cfg").read_text().splitlines()
    home = next(line.partition("=")[2].strip() for line in lines if line.partition("=")[0].strip() == "home")
    real = (venv / "bin" / "python").resolve().parent
    return sorted({Path(home).parent, real.parent})


def base_spec(default: dict[str, Any], binds: Iterable[tuple[str, str]], cache: Path) -> dict[str, Any]:
    """The runtime's default specification with the binds added. ``bind``, not ``rbind``: no submount may be pinned.

    Its limit of 1,024 open files is dropped, so containers inherit the supervisor's, which is the machine's highest.
    """
    kinds = [*((*bind, "ro") for bind in binds), (str(cache), PODS_CACHE, "rw")]
    mounts = [
        {"destination": there, "type": "bind", "source": here, "options": ["bind", kind, "nosuid", "nodev"]}
        for here, there, kind in kinds
    ]
    process = {key: value for key, value in default["process"].items() if key != "rlimits"}
    return {**default, "process": process, "mounts": [*default["mounts"], *mounts]}


def archive(image: Image) -> bytes:
    """The image in the archive format of `docker save`."""
    layer = _layer(image)
    config = {
        "architecture": "amd64" if os.uname().machine == "x86_64" else "arm64",
        "os": "linux",
        "config": {
            "Env": [f"{key}={value}" for key, value in image.environment.items()],
            "Entrypoint": image.entrypoint or None,
            "Cmd": None if image.entrypoint else ["/bin/bash"],
            "WorkingDir": "/tmp",
            "User": image.user,
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha256(layer).hexdigest()}"]},
        "history": [{"created": time.strftime("%FT%TZ", time.gmtime(0))}],
    }
    manifest = [{"Config": "config.json", "RepoTags": [image.name], "Layers": ["layer.tar"]}]
    return _tar(
        {"layer.tar": layer, "config.json": json.dumps(config).encode(), "manifest.json": json.dumps(manifest).encode()}
    )


def _layer(image: Image) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in _DIRECTORIES:
            _add(tar, name, tarfile.DIRTYPE, mode=0o1777 if name.endswith("tmp") else 0o755)
        for path in _SYSTEM:
            if Path(path).is_symlink():
                _add(tar, path[1:], tarfile.SYMTYPE, target=str(Path(path).readlink()))
        for name, text in _FILES.items():
            _add(tar, name, tarfile.REGTYPE, content=text.encode())
        for name, source in image.files.items():
            _add(tar, name, tarfile.REGTYPE, mode=0o755, content=source.read_bytes())
    return buffer.getvalue()


def _add(
    tar: tarfile.TarFile, name: str, kind: bytes, mode: int = 0o644, content: bytes = b"", target: str = "",
) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.mode, member.size, member.linkname = kind, mode, len(content), target
    tar.addfile(member, io.BytesIO(content))


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            _add(tar, name, tarfile.REGTYPE, content=content)
    return buffer.getvalue()
