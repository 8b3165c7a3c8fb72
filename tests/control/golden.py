"""Golden files: compared, or written anew when UPDATE_GOLDEN is set (then read the diff)."""

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"


def check(name: str, text: str) -> None:
    file = FOLDER / name
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    words = "differs: if that is right, run again with UPDATE_GOLDEN=1 and commit the diff"
    assert text == file.read_text(), f"{file} {words}"
