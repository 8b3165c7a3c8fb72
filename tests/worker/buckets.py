"""An object store in memory, under the protocol `bucket`."""

from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):  # type: ignore[misc]
    """Whole objects by key, and a switch that breaks uploads."""

    protocol = "bucket"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    broken = False

    @classmethod
    def empty(cls) -> None:
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        if Bucket.broken and mode != "rb":
            raise OSError("connection reset")
        return super()._open(path, mode, **more)


fsspec.register_implementation("bucket", Bucket, clobber=True)
