"""The verbs that read the files of a run. Each works on a directory alone, with no cluster; a job's name gets its
files from the cluster.
"""

from pathlib import Path

from rlhf_cli.exits import Wrong
from rlhf_cli.fetch import run_directory
from rlhf_cli.options import Target
from rlhf_cli.run_files import opened


def report(target: Target, where: str, out: Path | None) -> None:
    """Writes the page, and tells where. Raises NoFiles, Wrong."""
    from rlhf_cli.report import html

    with run_directory(target, where) as (folder, job):
        page = html(opened(folder), where, job)
    path = out or Path(f"{job.name if job else Path(where.rstrip('/')).name or 'run'}.html")
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise Wrong(f"--out {path}: {error.strerror}") from None
    print(path)
