"""A hook of mkdocs: files of the tree that a page links to, such as ../charts/rlhf-operator/values.yaml, become files
of the site, so that the link holds there as it does in the tree. One that is not there is left to mkdocs to tell.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

FOLDER = "source"  # of the site
LINK = re.compile(r"(?<=\]\()((?:\.\./)+[^)#\s]+)(#[^)\s]*)?")


def place(path: Path) -> str:
    """In the site. A document of the tree is shown as text: its own links lead into the tree."""
    return f"{FOLDER}/{path}{'.txt' if path.suffix == '.md' else ''}"


def outside(page: str, link: str, docs: Path) -> Path | None:
    """The file outside of `docs` that a link of a page means, from the root of the tree; None for any other link."""
    root = docs.parent.resolve()
    target = (docs / page).parent.joinpath(link).resolve()
    inside = target.is_relative_to(docs.resolve())
    return None if inside or not target.is_file() else target.relative_to(root)


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    docs = Path(config.docs_dir)
    pages = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    linked = {found for page, text in pages for link, _ in LINK.findall(text) if (found := outside(page, link, docs))}
    for path in sorted(linked):
        files.append(File.generated(config, place(path), abs_src_path=str(docs.parent / path)))
    return files


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    def moved(link: re.Match[str]) -> str:
        found = outside(page.file.src_uri, link[1], Path(config.docs_dir))
        return f"{'../' * page.file.src_uri.count('/')}{place(found)}" if found else link[0]

    return LINK.sub(moved, markdown)
