"""`kubectl_complete-rlhf`, which kubectl asks when `kubectl rlhf` is completed: Typer's own completion in its words."""

import os
import shlex
import sys

NO_FILES = ":4"  # cobra's directive: what is listed is all that there is


def process() -> None:
    from rlhf_cli.app import app

    words = sys.argv[1:]
    os.environ |= {
        "_KUBECTL_RLHF_COMPLETE": "complete_bash", "COMP_CWORD": str(max(1, len(words))),
        "COMP_WORDS": shlex.join(["kubectl-rlhf", *words]),
    }  # fmt: skip
    try:
        app(prog_name="kubectl-rlhf")
    except SystemExit:  # Typer ends the process once it has told
        print(NO_FILES)
