"""The place of checkpoints: a directory, or a URL of any filesystem that fsspec knows. Both through fsspec, so there is
one way.
"""

import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from fsspec.core import url_to_fs

from rlhf_worker.errors import BadSpec

CHUNK_BYTES = 16 << 20


class Store:
    """Files under `root`. A directory renames atomically; elsewhere only one file is atomic, so whoever writes several
    writes the telling one last.
    """

    def __init__(self, root: str) -> None:
        """Connects to nothing yet. Raises BadSpec for a filesystem that has no driver here."""
        self.root = root.rstrip("/")
        try:
            self.fs, self.inside = url_to_fs(self.root)
        except (ImportError, ValueError) as error:
            raise BadSpec(f"spec.checkpoint.path: {root}: {error}; put fsspec's driver for it into spec.image, or use "
                "a directory on a mounted volume") from error
        self.local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    def url(self, name: str) -> str:
        """As users write it, and as torch's readers take it."""
        return f"{self.root}/{name}"

    def path(self, name: str) -> str:
        """As fsspec's own calls take it."""
        return f"{self.inside}/{name}"

    def names(self, directory: str = "") -> list[str]:
        """What lies directly in it; nothing where it is not there. Raises OSError."""
        self.fs.invalidate_cache()
        try:
            return sorted(
                path.rstrip("/").rpartition("/")[2]
                for path in self.fs.ls(self.path(directory).rstrip("/"), detail=False)
            )
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        """Raises OSError."""
        data: bytes = self.fs.cat_file(self.path(name))
        return data

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        """At once, where the driver can. Raises OSError."""
        contents: list[bytes] = self.fs.cat_ranges([self.path(name) for name in names], None, None, on_error="raise")
        return contents

    def write(self, name: str, data: bytes) -> tuple[int, int]:
        """Whole or not at all, and on the disk when it returns. Returns size and CRC32. Raises OSError."""
        if self.local:
            self._staged(name, data).rename(self.path(name))
        else:
            self.fs.makedirs(self.path(name).rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(self.path(name), data)
        return len(data), zlib.crc32(data)

    def create(self, name: str, data: bytes) -> None:
        """As `write`, for one writer only: raises FileExistsError when the file is there. Where storage has no such
        call, two at once may both succeed.
        """
        path = self.path(name)
        if self.local:
            staged = self._staged(name, data)
            try:
                _only_once(staged, Path(path))
            finally:
                staged.unlink(missing_ok=True)
        else:
            self._create_remote(path, data)

    def _create_remote(self, path: str, data: bytes) -> None:
        self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        self.fs.invalidate_cache()
        if self.fs.exists(path):
            raise FileExistsError(path)
        try:
            self.fs.pipe_file(path, data, mode="create")
        except TypeError:  # a driver that does not know modes
            self.fs.pipe_file(path, data)
        except OSError as error:
            self.fs.invalidate_cache()
            if self.fs.exists(path):  # drivers tell of it in their own ways
                raise FileExistsError(path) from error
            raise

    def _staged(self, name: str, data: bytes) -> Path:
        """On the disk, beside its place, under a name that no other process uses."""
        path = Path(self.path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
        try:
            with staged.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            staged.unlink(missing_ok=True)
            raise
        return staged

    def measure(self, name: str) -> tuple[int, int]:
        """Size and CRC32 of what is there. Raises OSError."""
        size = crc = 0
        with self.fs.open(self.path(name), "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                size, crc = size + len(chunk), zlib.crc32(chunk, crc)
        return size, crc

    def remove(self, name: str) -> None:
        """With all that is in it, if it is there. Raises OSError."""
        if self.fs.exists(self.path(name)):
            self.fs.rm(self.path(name), recursive=True)

    def rename(self, old: str, new: str) -> None:
        """A directory, atomically where this is a directory of this machine."""
        self.remove(new)
        self.fs.mv(self.path(old), self.path(new), recursive=True)

    def room(self) -> tuple[int, int] | None:
        """Free and all bytes of the volume; None where that has no meaning."""
        if not self.local:
            return None
        existing = next(p for p in (Path(self.inside), *Path(self.inside).parents) if p.exists())
        usage = shutil.disk_usage(existing)
        return usage.free, usage.total

    @contextmanager
    def publishing(self, name: str, telling: str, mark: str, check: Callable[[], None]) -> Iterator[Path]:
        """A local directory to fill, which takes the place of `name` when the block ends well. Elsewhere than on a
        local disk the file `telling` goes last.

        mark: the writer's own, so that two that fill theirs at once do not meet; check: raises when it may publish no
        more. """
        if self.local:
            with self._directory(f".{name}.{mark}.partial") as filled:
                yield filled
                check()
                self._replace(name, filled, f".{name}.{mark}.replaced")
            return
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
            check()
            self.remove(f"{name}/{telling}")  # first of all: nobody takes what is left for whole
            self.remove(name)
            for file in sorted(Path(scratch).iterdir(), key=lambda file: file.name == telling):
                check()
                self.fs.put_file(str(file), self.path(f"{name}/{file.name}"))

    @contextmanager
    def _directory(self, name: str) -> Iterator[Path]:
        """An empty one, gone at the end unless it has another name by then."""
        self.remove(name)
        self.fs.makedirs(self.path(name), exist_ok=True)
        try:
            yield Path(self.path(name))
        finally:
            self.remove(name)

    def _replace(self, name: str, filled: Path, aside: str) -> None:
        """At once: nobody finds half of the one or the other. What was there comes back when `filled` is gone, which a
        later writer removes.
        """
        place, before = Path(self.path(name)), Path(self.path(aside))
        self.remove(aside)
        if place.exists():
            place.rename(before)
        try:
            filled.rename(place)
        except OSError:
            if before.exists():
                before.rename(place)
            raise
        self.remove(aside)


def _only_once(staged: Path, path: Path) -> None:
    """Volumes without hard links have no call for this, so there is a moment between the look and the rename."""
    try:
        path.hardlink_to(staged)
    except FileExistsError:
        raise
    except OSError:
        if path.exists():
            raise FileExistsError(path) from None
        staged.rename(path)
