"""`kubectl rlhf logs --attempt`: what a driver printed whose pod is gone."""

from collections.abc import Iterable

from rlhf_cli.exits import NoFiles
from rlhf_cli.fetch import run_directory
from rlhf_cli.history import of_source
from rlhf_cli.options import Target
from rlhf_cli.run_files import attempts, opened


def show(target: Target, where: str, number: int, source: str, tail: int | None) -> None:
    """Raises NoFiles for an attempt that was not kept."""
    with run_directory(target, where, ("logs",)) as (folder, _):
        kept = {one.number: one for one in attempts(opened(folder))}
    if number not in kept:
        raise NoFiles(f"no log of attempt {number} is kept in {where}, only of {_listed(kept) or 'none'}")
    lines = list(of_source(kept[number].log.splitlines(), source))
    for line in lines if tail is None else lines[len(lines) - min(tail, len(lines)):]:
        print(line)


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
