"""The pictures of docs/pictures that show a run, from what a real one left.

    kubectl get rlhfjob NAME -o json > job.json; kubectl logs HEAD_POD -c driver > driver.log
    python -m hack.pictures status job.json driver.log
    python -m hack.pictures report CHECKPOINT_PATH

`report` needs Chromium on the PATH.
"""

import argparse
import json
import subprocess
import tempfile
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.terminal_theme import MONOKAI
from rich.text import Text

from hack.generate import ROOT
from rlhf_cli.file_verbs import report as write
from rlhf_cli.history import steps
from rlhf_cli.options import Target
from rlhf_cli.status_page import page
from rlhf_client.job import Job

PICTURES = ROOT / "docs/pictures"
COLUMNS = 100
# Rich's own, without the fonts that it would fetch.
SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: system-ui, sans-serif; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""


def newest(raw: Any) -> datetime:
    """When the job was looked at: the last time that its status tells of."""
    told = raw["status"]
    times = [one["lastTransitionTime"] for one in told["conditions"]]
    return max(map(datetime.fromisoformat, [*times, told.get("progress", {}).get("reportTime") or times[0]]))


def status(job: Path, log: Path) -> None:
    """As `kubectl rlhf status` prints it on a terminal."""
    raw = json.loads(job.read_text())
    history = steps(log.read_text().splitlines())
    out = Console(record=True, width=COLUMNS, force_terminal=True, file=StringIO())
    for line in page(Job.of(raw), history, newest(raw), COLUMNS):
        told = line.lstrip(" ")
        out.print(Padding(Text.from_markup(told), (0, 0, 0, len(line) - len(told)), expand=False) if told else "")
    title = f"kubectl rlhf status {raw['metadata']['name']}"
    out.save_svg(str(PICTURES / "status.svg"), title=title, theme=MONOKAI, code_format=SVG, unique_id="status")


def report(directory: Path) -> None:
    """The top of the page of a run, in headless Chromium."""
    with tempfile.TemporaryDirectory() as scratch:
        html = Path(scratch) / "run.html"
        write(Target(), str(directory), html)
        command = ["chromium", "--headless=new", "--no-sandbox", "--hide-scrollbars", "--window-size=1100,1000",
            f"--user-data-dir={scratch}/profile", f"--screenshot={PICTURES / 'report.png'}", html.as_uri()]
        subprocess.run(command, check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    of_status = verbs.add_parser("status")
    of_status.add_argument("job", type=Path)
    of_status.add_argument("log", type=Path)
    verbs.add_parser("report").add_argument("directory", type=Path)
    given = parser.parse_args()
    if given.verb == "status":
        status(given.job, given.log)
    else:
        report(given.directory)


if __name__ == "__main__":
    main()
