"""The fenced blocks of the documents, and the commands in those of a shell."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

from hack.generate import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:kubectl rlhf|make) [^`\n]+)`")
HERE = re.compile(r"^(.*) <<'?(\w+)'?\n.*?^\2$", re.MULTILINE | re.DOTALL)
LOOP = {"for", "done"}
ENDS = {"|", "||", "&&", ";", "&"}


@dataclass(frozen=True, slots=True)
class Block:
    """`where`: page and line of its opening."""

    where: str
    language: str
    text: str


def blocks(language: str = "", page: Path | None = None) -> list[Block]:
    """Of all pages or one, in one language or all."""
    found = [block for path in ([page] if page else PAGES) for block in _of(path)]
    return [block for block in found if not language or block.language == language]


def _of(path: Path) -> Iterator[Block]:
    text = path.read_text()
    for match in FENCE.finditer(text):
        where = f"{path.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}"
        yield Block(where, match[2].partition(" ")[0], dedent(match[3]))


def commands() -> list[tuple[str, list[str]]]:
    """(where, words) of each simple command in the blocks of a shell."""
    return [(block.where, words) for block in blocks("sh") for words in _simple(block.text)]


def mentions() -> list[tuple[str, list[str]]]:
    """(page, words) of `kubectl rlhf VERB ...` and `make TARGET` in the text around the blocks."""
    found = ((path, match[1]) for path in PAGES for match in INLINE.finditer(FENCE.sub("", path.read_text())))
    return [(str(path.relative_to(ROOT)), words) for path, text in found for words in _simple(text)]


def _simple(text: str) -> Iterator[list[str]]:
    """A line that ends in a backslash goes on in the next; comments, loops, redirections and what a here-document holds
    are left out.
    """
    for line in HERE.sub(r"\1", text).replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        words = list[str]()
        for word in [*lexer, ";"]:
            if word in ENDS and words:
                yield from [words] if words[0] not in LOOP else []
                words = []
            elif word not in ENDS and (words or word != "do"):
                words.append(word)
