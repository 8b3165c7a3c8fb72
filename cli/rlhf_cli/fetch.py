"""The files of a run on this machine: a directory as it is, a URL by fsspec, or a job's by kubectl from a trainer pod.

kubectl carries the stream, for it needs a WebSocket and every way to sign in that kubectl has.
"""

import re
import shlex
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlhf_cli.exits import NoFiles
from rlhf_cli.options import Target
from rlhf_client import names
from rlhf_client.job import Job

# What a run leaves beside its weights (docs/checkpoints.md).
PARTS = ("tensorboard", "rollouts", "logs", "fence")
RUN = "run.json"
URL = re.compile(r"[a-z][a-z0-9+.-]*://.+")
NEEDS = "this needs the packages that read a run's files: pip install 'rlhf-cli[files]'"
COPY_SECONDS = 600.0


@contextmanager
def run_directory(target: Target, where: str, parts: Sequence[str] = PARTS) -> Iterator[tuple[Path, Job | None]]:
    """A directory that holds `parts` of a checkpoint.path, and the job where `where` is the name of one. A copy is gone
    afterwards. Raises NoFiles, ClientError.
    """
    if URL.fullmatch(where):
        with tempfile.TemporaryDirectory(prefix="rlhf-") as folder:
            _download(where, parts, Path(folder))
            yield Path(folder), None
    elif Path(where).is_dir():
        yield Path(where), None
    elif "/" in where or where.startswith("."):
        raise NoFiles(f"{where}: no such directory: give a checkpoint.path, a URL of one, or the name of a job")
    else:
        with tempfile.TemporaryDirectory(prefix="rlhf-") as folder:
            yield Path(folder), _of_job(target, where, parts, Path(folder))


def _of_job(target: Target, name: str, parts: Sequence[str], folder: Path) -> Job:
    import asyncio

    async def look() -> tuple[Job, str, str]:
        async with target.client() as client:
            job = await client.get(name)
            trainers = [one for one in await client.pods(name)
                if one["metadata"]["labels"].get(names.ROLE_LABEL) == names.TRAINER
                and (one.get("status") or {}).get("phase") == "Running"]
            return job, str(trainers[0]["metadata"]["name"]) if trainers else "", client.namespace

    job, pod, namespace = asyncio.run(look())
    path = str((job.spec.get("checkpoint") or {}).get("path") or "/checkpoints")
    if URL.fullmatch(path) and not path.startswith("file://"):
        _download(path, parts, folder)
    elif pod:
        _copy(target, namespace, pod, path.removeprefix("file://"), parts, folder)
    else:
        raise NoFiles(f"{name} has no trainer pod now, and its checkpoint.path {path} can be read in one alone: mount "
            f"its volume{_claim(job)}, and give the directory in the place of the name")
    return job


def _claim(job: Job) -> str:
    made = (job.spec.get("checkpoint") or {}).get("claim")
    return f" (PersistentVolumeClaim {names.claim(job.name)} in {job.namespace})" if made else ""


def _copy(target: Target, namespace: str, pod: str, path: str, parts: Sequence[str], folder: Path) -> None:
    wanted = " ".join(map(shlex.quote, parts))
    script = f"cd {shlex.quote(path)} && tar cf - $(ls -d {wanted} step-*/{RUN} 2>/dev/null)"
    command = ["kubectl", *target.kubectl(), "exec", pod, "-c", names.RAY, "--", "sh", "-c", script]
    if target.namespace is None:
        command[1:1] = ["--namespace", namespace]
    with tempfile.TemporaryFile() as packed:  # samples of a long run are no thing to hold in memory
        try:
            done = subprocess.run(command, stdout=packed, stderr=subprocess.PIPE, check=False, timeout=COPY_SECONDS)
        except FileNotFoundError:
            raise NoFiles("kubectl is not on the PATH: it copies the files out of the pod") from None
        except subprocess.TimeoutExpired:
            raise NoFiles(f"the files did not come out of pod {pod} within {COPY_SECONDS:g} s") from None
        packed.seek(0)
        try:
            with tarfile.open(fileobj=packed) as archive:
                archive.extractall(folder, filter="data")
        except tarfile.TarError as error:
            words = done.stderr.decode(errors="replace").strip() or str(error)
            why = f"no files of {path} in pod {pod}: {words} (this needs the right to create pods/exec)"
            raise NoFiles(why) from None


def _download(url: str, parts: Sequence[str], folder: Path) -> None:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise NoFiles(NEEDS) from None
    try:
        fs, root = url_to_fs(url.rstrip("/"))
        there = {found.rstrip("/").rpartition("/")[2] for found in fs.ls(root, detail=False)}
        for name in filter(lambda part: fs.exists(f"{root}/{part}"), parts):
            (folder / name).parent.mkdir(exist_ok=True)
            fs.get(f"{root}/{name}", str(folder / name), recursive=True)
        for name in (one for one in there if one.startswith("step-") and fs.exists(f"{root}/{one}/{RUN}")):
            (folder / name).mkdir()
            fs.get(f"{root}/{name}/{RUN}", str(folder / name / RUN))
    except ImportError as error:
        raise NoFiles(f"{url}: {error}") from None
    except Exception as error:  # each filesystem has errors of its own
        raise NoFiles(f"{url}: {type(error).__name__}: {error}") from None
