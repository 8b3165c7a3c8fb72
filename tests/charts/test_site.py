"""The site builds without a broken link, and asks no other host for anything."""

import re
import subprocess
import sys
from pathlib import Path

from hack.generate import ROOT

# What a browser fetches by itself; a link that a reader may follow is none.
FETCHED = re.compile(r"<(?:script|img|iframe|source)[^>]+src=[\"']?(https?:)?//|<link[^>]+href=[\"']?(https?:)?//")
IMPORTED = re.compile(r"@import\s+url\(\s*[\"']?(https?:)?//|url\(\s*[\"']?(https?:)?//")
PICTURE_BYTES = 300_000


def test_the_site_is_built_strictly_and_asks_no_other_host(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    pages, styles = [*tmp_path.rglob("*.html")], [*tmp_path.rglob("*.css")]
    assert len(pages) > 40 and styles
    assert [page.name for page in pages if FETCHED.search(page.read_text())] == []
    assert [style.name for style in styles if IMPORTED.search(style.read_text())] == []


def test_pictures_are_small_and_shown() -> None:
    pictures = [path for path in (ROOT / "docs/pictures").iterdir()]
    text = "\n".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    assert {path.name for path in pictures if path.stat().st_size > PICTURE_BYTES} == set()
    assert {path.name for path in pictures if f"pictures/{path.name})" not in text} == set()
