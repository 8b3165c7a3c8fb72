"""model.source: a checkpoint comes from the hub once a cluster. One node downloads it; the others see it on a volume
that they share, or get it from that node. What is there already, whole, is used as it is.
"""

import contextlib
import errno
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import ray
from ray.actor import ActorHandle

from rlhf_api.job import HubSource, ModelSpec
from rlhf_api.run import RunConfig
from rlhf_worker.calls import call_all, gather
from rlhf_worker.errors import BadSpec, DownloadFailed
from rlhf_worker.placement import Stage
from rlhf_worker.pretrained import model_field
from rlhf_worker.progress import Reporter

MARK = ".rlhf-source.json"  # written last: what is whole, and of which repository
OTHER_FORMATS = (
    ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite",
)  # beside safetensors
PIECE_BYTES = 16 << 20
FIRST_WAIT, LONGEST_WAIT = 1.0, 120.0  # seconds between tries
PATIENCE_SECONDS = 600.0  # without a byte more
DEADLINE_SECONDS = 7 * 86_400.0  # of a download that goes on; the operator's stallTimeoutSeconds is shorter
TELL_SECONDS = 5.0
NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
FILES_AT_A_TIME = 4

Files = dict[str, int]  # bytes by name, relative to the directory


class Keeper:
    """One node's copy of a model."""

    def __init__(self, field: str, spec: ModelSpec) -> None:
        assert spec.source is not None
        self.field, self.source, self.directory = field, spec.source, Path(spec.path)
        self.wanted, self.trouble = 0, ""  # bytes of it all; why it does not go on, while it does not

    def whole(self) -> Files | None:
        """What it consists of, if all of it is here. Raises BadSpec if something else is."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            mark = json.loads((self.directory / MARK).read_text())
            self._check(mark)
            files: Files = mark["files"]
            return files if all(_size(self.directory / name) == size for name, size in files.items()) else None
        return None

    def _check(self, mark: dict[str, Any]) -> None:
        there, wanted = HubSource(repo=mark["repo"], revision=mark["revision"]), self.source
        if there != wanted:
            words = f"{there.repo} at {there.revision} is there, source is {wanted.repo} at {wanted.revision}"
            raise BadSpec(f"{self.field}.path: {self.directory}: {words}: use another directory, or remove that one")

    def download(self, wait: Callable[[float], None] = time.sleep) -> Files:
        """All of it; goes on with what was begun. Raises BadSpec; DownloadFailed after 10 minutes without
        progress."""
        tries, size, moved = 0, -1, time.monotonic()
        while True:
            try:
                return self._try()
            except Exception as error:
                _raise_if_final(
                    error, f"{self.field}.source: {self.source.repo} at {self.source.revision}", self.directory
                )
                if (now := self.bytes()) > size:
                    tries, size, moved = 0, now, time.monotonic()
                if time.monotonic() - moved > PATIENCE_SECONDS:
                    raise DownloadFailed(
                        f"{self.field}.source: {self.source.repo}: {PATIENCE_SECONDS:g} s without progress: {error}"
                    ) from error
                self.trouble = f"try {tries + 2} after: {_words(error)}"
                print(f"{self.source.repo}: {self.trouble}", file=sys.stderr, flush=True)
                # Of many clusters that were refused together not all come again together.
                wait(max(_asked(error), random.uniform(0.5, 1.0) * min(LONGEST_WAIT, FIRST_WAIT * 2**tries)))
                tries += 1

    def _try(self) -> Files:
        from huggingface_hub import HfApi

        hub, repo, revision = HfApi(), self.source.repo, self.source.revision
        info = hub.model_info(repo, revision=revision, files_metadata=True, timeout=30)
        files = chosen({file.rfilename: file.size or 0 for file in info.siblings or ()})
        self.wanted = sum(files.values())
        # Apart until all is there: of two commits of a branch every file may have the same size.
        begun = self.directory / f".{info.sha}"
        with ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
            list(
                pool.map(
                    lambda name: self._file(
                        hub_url(hub.endpoint, repo, str(info.sha), name), begun / name, files[name]
                    ),
                    files,
                )
            )
        self.trouble = ""
        return self._moved(begun, files)

    def _file(self, url: str, target: Path, size: int) -> None:
        """Goes on where an earlier try, or process, was cut off, which snapshot_download does not."""
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        partial = target.with_name(f"{target.name}.part")
        if _size(target) != size:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("ab") as file:
                http_get(url, file, resume_size=file.tell(), headers=build_hf_headers(), expected_size=size)
            partial.replace(target)

    def copy(self, peer: ActorHandle, files: Files) -> Files:
        """From another node's copy. Raises OSError."""
        self.wanted, begun = sum(files.values()), self.directory / ".copy"
        for name, size in files.items():
            (begun / name).parent.mkdir(parents=True, exist_ok=True)
            with (begun / name).open("wb") as file:
                for start in range(0, size, PIECE_BYTES):
                    file.write(ray.get(peer.piece.remote(name, start)))
        return self._moved(begun, files)

    def _moved(self, begun: Path, files: Files) -> Files:
        """Into place, the mark last."""
        for name in files:
            (self.directory / name).parent.mkdir(parents=True, exist_ok=True)
            (begun / name).replace(self.directory / name)
        shutil.rmtree(begun)
        mark = {"repo": self.source.repo, "revision": self.source.revision, "files": files}
        partial = self.directory / f"{MARK}.part"
        partial.write_text(json.dumps(mark))
        partial.replace(self.directory / MARK)
        return files

    def piece(self, name: str, start: int) -> bytes:
        with (self.directory / name).open("rb") as file:
            file.seek(start)
            return file.read(PIECE_BYTES)

    def bytes(self) -> int:
        """What is here of it, also of files that are under way."""
        return sum(_size(path) or 0 for path in self.directory.rglob("*"))

    def told(self) -> str:
        gib, trouble = 1 << 30, f", {self.trouble}" if self.trouble else ""
        return (
            f"{min(self.bytes(), self.wanted) / gib:.1f} of {self.wanted / gib:.1f} GiB of {self.source.repo}{trouble}"
        )


def chosen(files: Files) -> Files:
    """What transformers and vLLM load: where there are safetensors, no weights in other formats."""
    top = {name: size for name, size in files.items() if not name.startswith((".", "original/", "onnx/"))}
    if not any(name.endswith(".safetensors") for name in top):
        return top
    return {name: size for name, size in top.items() if not name.endswith(OTHER_FORMATS)}


def _size(path: Path) -> int | None:
    with contextlib.suppress(OSError):
        return path.stat().st_size if path.is_file() else None
    return None


def hub_url(endpoint: str, repo: str, commit: str, name: str) -> str:
    return f"{endpoint}/{repo}/resolve/{commit}/{quote(name)}"


def _raise_if_final(error: Exception, what: str, directory: Path) -> None:
    """Raises BadSpec for what no further try mends, and the error itself where it is not the hub's or the network's."""
    from huggingface_hub import get_session

    if (status := getattr(getattr(error, "response", None), "status_code", None)) is not None:
        if status in (401, 403, 404):
            fix = (
                "correct it; for a repository that needs a token set HF_TOKEN in pods.trainer.env and pods.rollout.env"
            )
            raise BadSpec(f"{what}: the hub answers {status}: {_words(error)}: {fix}") from error
        return
    if isinstance(error, OSError) and error.errno in NO_PLACE:
        raise BadSpec(
            f"{what}: {directory}: {error.strerror}: mount a volume with room for it that can be written"
        ) from error
    network = sys.modules[type(get_session()).__module__.split(".")[0]].TransportError
    if not isinstance(error, (network, ConnectionError, TimeoutError)) and "Consistency check failed" not in str(error):
        raise error


def _asked(error: Exception) -> float:
    """Seconds that the hub asks to wait, an hour at most."""
    with contextlib.suppress(ValueError):
        return min(3600.0, float(getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")))
    return 0.0


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def ensure(spec: ModelSpec, field: str = "spec.model") -> None:
    """On a node that came later, for itself. Raises BadSpec, DownloadFailed."""
    if spec.source is not None and (keeper := Keeper(field, spec)).whole() is None:
        keeper.download()


def fetch(config: RunConfig, stage: Stage, reporter: Reporter) -> None:
    """Every model that has a source, onto every node. Raises BadSpec, DownloadFailed."""
    slots = list({bundle.node: slot for slot, bundle in sorted(stage.bundles.items(), reverse=True)}.values())[::-1]
    models = {
        spec.path: (model_field(role).removesuffix(".path"), spec) for role, spec in config.roles.items() if spec.source
    }
    for field, spec in models.values():
        keepers = [
            RemoteKeeper.options(max_concurrency=4, **stage.options(slot, 0.0)).remote(field, spec) for slot in slots
        ]
        with reporter.bounded():
            spread(keepers, lambda words: reporter.update(detail=words))
        for keeper in keepers:
            ray.kill(keeper)


def spread(keepers: Sequence[ActorHandle], tell: Callable[[str], None]) -> None:
    """One downloads, unless one has it; the others that do not see it then copy from it. `tell`: how far it is."""
    held = dict(
        zip(keepers, call_all(keepers, "whole", deadline_seconds=600.0, what="look for the model"), strict=True)
    )
    first = next((keeper for keeper in keepers if held[keeper]), keepers[0])
    files = (
        held[first]
        or gather([first.download.remote()], DEADLINE_SECONDS, "download", _telling(first, "downloading", tell))[0]
    )
    others = [keeper for keeper in keepers if keeper is not first and not held[keeper]]
    seen = call_all(others, "whole", deadline_seconds=600.0, what="look for the model")
    lacking = [keeper for keeper, there in zip(others, seen, strict=True) if not there]
    copies = [keeper.copy.remote(first, files) for keeper in lacking]
    if copies:
        gather(
            copies, DEADLINE_SECONDS, "copies of the model",
            _telling(lacking[-1], f"copying to {len(copies)} nodes", tell),
        )


def _telling(keeper: ActorHandle, what: str, tell: Callable[[str], None]) -> Callable[[], None]:
    """For `gather`: asks every few seconds, and tells what is new."""
    asked, last, due = [keeper.told.remote()], "", 0.0

    def look() -> None:
        nonlocal asked, last, due
        done, asked = ray.wait(asked, timeout=0) if asked else ([], [])
        if done and (words := f"{what}: {ray.get(done[0])}") != last:
            tell(words)
            last = words
        if not asked and time.monotonic() > due:
            asked, due = [keeper.told.remote()], time.monotonic() + TELL_SECONDS

    return look


RemoteKeeper = ray.remote(Keeper)
