"""model.source: a checkpoint comes from the hub once a cluster. One node downloads it; the others see it on a volume
that they share, or get it from that node. What is there already, whole, is used as it is.
"""

import contextlib
import hashlib
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import ray
from ray.actor import ActorHandle

from rlhf_api.job import HubSource, ModelSpec
from rlhf_api.run import RunConfig
from rlhf_worker.calls import call_all, gather
from rlhf_worker.deadlines import work_seconds
from rlhf_worker.errors import BadSpec, Call, DownloadFailed, Verdict, verdict
from rlhf_worker.placement import Stage
from rlhf_worker.pretrained import is_directory, model_field
from rlhf_worker.progress import Reporter

MARK = ".rlhf-source.json"  # written last: what is whole, and of which repository
OTHER_FORMATS = (
    ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite",
)  # beside safetensors
PIECE_BYTES = 16 << 20
FIRST_WAIT, LONGEST_WAIT = 1.0, 120.0  # seconds between tries
DEADLINE_SECONDS = 7 * 86_400.0  # of a download that goes on; the operator's stallTimeoutSeconds is shorter
TELL_SECONDS = 5.0
FILES_AT_A_TIME = 4

T = TypeVar("T")
Files = dict[str, int]  # bytes by name, relative to the directory


class Asker:
    """Of a hub id that every process of the run is about to ask for."""

    def __init__(self, field: str, spec: ModelSpec, patience: float) -> None:
        """patience: seconds without a byte more."""
        self.field, self.spec, self.patience = field, spec, patience
        self.what, self.directory = f"{field}.path: {spec.path}", Path(spec.path)
        self.trouble = ""  # why it does not go on, while it does not

    def answer(self, wait: Callable[[float], None] = time.sleep) -> None:
        """Returns when the hub answers, or need not: what it says is told by who reads the model. Raises
        DownloadFailed.
        """
        if is_directory(self.spec) or _cached(self.spec.path):
            return
        from huggingface_hub import HfApi

        with contextlib.suppress(BadSpec):
            self.persisting(lambda: HfApi().model_info(self.spec.path, timeout=30), wait)

    def status(self) -> str:
        return f"{self.what}: {self.trouble}" if self.trouble else ""

    def bytes(self) -> int:
        """So far."""
        return 0

    def persisting(self, work: Callable[[], T], wait: Callable[[float], None]) -> T:
        """What `work` gives, which asks the hub, at last.

        Raises BadSpec for what no further try mends, DownloadFailed after `patience` seconds without a byte more, and
        the error itself where it is neither the hub's nor the network's.
        """
        tries, size, moved = 0, -1, time.monotonic()
        while True:
            try:
                return work()
            except DownloadFailed:
                raise
            except Exception as error:
                match verdict(Call.HUB, error):
                    case Verdict.SPEC:
                        raise BadSpec(f"{self.what}: {_refusal(error, self.directory)}") from error
                    case Verdict.OURS:
                        raise
                if (now := self.bytes()) > size:
                    tries, size, moved = 0, now, time.monotonic()
                if time.monotonic() - moved > self.patience:
                    raise DownloadFailed(f"{self.what}: {self.patience:g} s without progress: {error}") from error
                self.trouble = f"waiting for the hub, try {tries + 2} after: {_words(error)}"
                print(f"{self.what}: {self.trouble}", file=sys.stderr, flush=True)
                # Of many clusters that were refused together not all come again together.
                wait(max(_asked(error), random.uniform(0.5, 1.0) * min(LONGEST_WAIT, FIRST_WAIT * 2**tries)))
                tries += 1


class Keeper(Asker):
    """One node's copy of a model."""

    def __init__(self, field: str, spec: ModelSpec, patience: float) -> None:
        super().__init__(field, spec, patience)
        assert spec.source is not None
        self.source, self.wanted = spec.source, 0  # bytes of it all
        self.what = f"{field}.source: {self.source.repo} at {self.source.revision}"

    def whole(self) -> Files | None:
        """What it consists of, if all of it is here. Raises BadSpec if something else is."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            mark = json.loads((self.directory / MARK).read_text())
            self._check(mark)
            files: Files = mark["files"]
            return files if all(_size(self.directory / name) == size for name, size in files.items()) else None
        return None

    def _check(self, mark: dict[str, Any]) -> None:
        present, wanted = HubSource(repo=mark["repo"], revision=mark["revision"]), self.source
        if present != wanted:
            words = f"{present.repo} at {present.revision} is there, source is {wanted.repo} at {wanted.revision}"
            raise BadSpec(f"{self.field}.path: {self.directory}: {words}: use another directory, or remove that one")

    def download(self, wait: Callable[[float], None] = time.sleep) -> Files:
        """All of it; goes on with what was begun. Raises BadSpec, DownloadFailed."""
        return self.persisting(self._try, wait)

    def _try(self) -> Files:
        from huggingface_hub import HfApi

        hub, repo, revision = HfApi(), self.source.repo, self.source.revision
        info = hub.model_info(repo, revision=revision, files_metadata=True, timeout=30)
        siblings = {file.rfilename: file for file in info.siblings or ()}
        files = chosen({name: file.size or 0 for name, file in siblings.items()})
        self.wanted = sum(files.values())
        # Apart until all is there: of two commits of a branch every file may have the same size.
        begun = self.directory / f".{info.sha}"
        with ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
            list(
                pool.map(
                    lambda name: self._file(
                        hub_url(hub.endpoint, repo, str(info.sha), name), begun / name, files[name],
                        lfs.sha256 if (lfs := siblings[name].lfs) else "",
                    ),
                    files,
                )
            )
        self.trouble = ""
        return self._moved(begun, files)

    def _file(self, url: str, target: Path, size: int, digest: str) -> None:
        """digest: sha256 where the hub tells it, which it does of large files, else "".

        Goes on where an earlier try, or process, was cut off, which snapshot_download does not; from the beginning
        where what came is not what the hub has. Raises DownloadFailed where it is not so again.
        """
        if _size(target) == size:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.part")
        for _ in range(2):
            _get(url, partial, size)
            if not digest or (digest_here := sha256(partial)) == digest:
                partial.replace(target)
                return
            partial.unlink()
        raise DownloadFailed(
            f"{self.field}.source: {self.source.repo}: {target.name} came damaged twice: its sha256 is {digest_here}, "
            f"and the hub says {digest}: is a proxy or a mirror between (HF_ENDPOINT, HTTPS_PROXY), or is the volume "
            f"of {self.directory} broken?"
        )

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

    def status(self) -> str:
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


def _get(url: str, partial: Path, size: int) -> None:
    """What is missing of it."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    if (_size(partial) or 0) > size:
        partial.unlink()
    with partial.open("ab") as file:
        if not size or file.tell() < size:
            http_get(url, file, resume_size=file.tell(), headers=build_hf_headers(), expected_size=size)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refusal(error: Exception, directory: Path) -> str:
    if (status := getattr(getattr(error, "response", None), "status_code", None)) is not None:
        fix = "correct it; for a repository that needs a token set HF_TOKEN in pods.trainer.env and pods.rollout.env"
        return f"the hub answers {status}: {_words(error)}: {fix}"
    if isinstance(error, OSError) and error.errno:
        return f"{directory}: {error.strerror}: mount a volume with room for it that can be written"
    return f"{Call.HUB}: {_words(error)}"


def _asked(error: Exception) -> float:
    """Seconds that the hub asks to wait, an hour at most."""
    with contextlib.suppress(ValueError):
        return min(3600.0, float(getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")))
    return 0.0


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def ensure(spec: ModelSpec, patience: float) -> None:
    """On a node that came later, for itself. Raises BadSpec, DownloadFailed."""
    if spec.source is not None and (keeper := Keeper("spec.model", spec, patience)).whole() is None:
        keeper.download()


def fetch(config: RunConfig, stage: Stage, reporter: Reporter) -> None:
    """Every model that has a source, onto every node; and the hub is waited for where a path is an id of it.

    Raises BadSpec, DownloadFailed.
    """
    slots = list({bundle.node: slot for slot, bundle in sorted(stage.bundles.items(), reverse=True)}.values())[::-1]
    models = {spec.path: (model_field(role).removesuffix(".path"), spec) for role, spec in config.roles.items()}
    patience = work_seconds(config)

    def tell(words: str) -> None:
        reporter.update(detail=words)

    for field, spec in models.values():
        kind, places = (RemoteKeeper, slots) if spec.source else (RemoteAsker, [] if is_directory(spec) else slots[:1])
        actors = [
            kind.options(max_concurrency=4, **stage.options(slot, 0.0)).remote(field, spec, patience) for slot in places
        ]
        with reporter.bounded():
            if spec.source:
                spread(actors, tell)
            elif actors:
                gather([actors[0].answer.remote()], DEADLINE_SECONDS, "hub", _telling(actors[0], "", tell))
        for actor in actors:
            ray.kill(actor)


def _cached(repo: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):
        return isinstance(try_to_load_from_cache(repo, "config.json"), str)
    return False


def spread(keepers: Sequence[ActorHandle], tell: Callable[[str], None]) -> None:
    """One downloads, unless one has it; the others that do not see it then copy from it. `tell`: how far it is."""
    def look(actors: Sequence[ActorHandle]) -> dict[ActorHandle, Files | None]:
        answers = call_all(actors, "whole", deadline_seconds=600.0, what="look for the model")
        return dict(zip(actors, answers, strict=True))

    copies_here = look(keepers)
    first = next((keeper for keeper in keepers if copies_here[keeper]), keepers[0])
    files = copies_here[first]
    if files is None:
        telling = _telling(first, "downloading", tell)
        files = gather([first.download.remote()], DEADLINE_SECONDS, "download", telling)[0]
    others = [keeper for keeper in keepers if keeper is not first and not copies_here[keeper]]
    lacking = [keeper for keeper, seen in look(others).items() if not seen]
    copies = [keeper.copy.remote(first, files) for keeper in lacking]
    if copies:
        telling = _telling(lacking[-1], f"copying to {len(copies)} nodes", tell)
        gather(copies, DEADLINE_SECONDS, "copies of the model", telling)


def _telling(keeper: ActorHandle, what: str, tell: Callable[[str], None]) -> Callable[[], None]:
    """For `gather`: asks every few seconds, and tells what is new. `what`: before it."""
    asked, last, due = [keeper.status.remote()], "", 0.0

    def look() -> None:
        nonlocal asked, last, due
        done, asked = ray.wait(asked, timeout=0) if asked else ([], [])
        if done and (words := ray.get(done[0])) and words != last:
            tell(f"{what}: {words}" if what else words)
            last = words
        if not asked and time.monotonic() > due:
            asked, due = [keeper.status.remote()], time.monotonic() + TELL_SECONDS

    return look


RemoteKeeper, RemoteAsker = ray.remote(Keeper), ray.remote(Asker)
