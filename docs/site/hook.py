"""What mkdocs calls while it builds the site: the generated pages, and pages that lie outside this folder."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import moelora  # noqa: F401 - registers the method, and with it all choices
from docs.site import methods, reference

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)]*)?\))")


def outside() -> dict[str, str]:
    """Pages and pictures of the repository that the site shows too: their paths there, and here."""
    results = ROOT / "eval" / "results"
    found = {"CHANGELOG.md": "changelog.md"}
    for path in sorted([*results.rglob("*.md"), *results.rglob("*.png")]):
        inner = path.relative_to(results).as_posix()
        found[f"eval/results/{inner}"] = f"results/{inner.replace('README.md', 'index.md')}"
    return found


def generated() -> dict[str, str]:
    """The pages that are made from the code, by their addresses."""
    return {**methods.pages(), **reference.pages()}


def relinked(text: str, address: str) -> str:
    """A page with its links to files of the repository turned to where the site has them.

    Args:
        text: The page in Markdown.
        address: Its address on the site.
    """
    places = outside()
    origins = {there: here for here, there in places.items()}
    origin = origins.get(address, f"docs/{address}")

    def turned(found: re.Match[str]) -> str:
        target = found[2]
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        there = places.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if there is None:
            return found[0]
        return f"{found[1]}{posixpath.relpath(there, posixpath.dirname(address) or '.')}{found[3]}"

    return _LINK.sub(turned, text)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of the methods, of the library and of the results into the navigation."""
    lists: dict[str, list[Any]] = {
        "Methods": [{Path(page).stem: page} for page in methods.pages()],
        # by their folders: many a heading is that of several
        "Results": [
            {page.removeprefix("results/").removesuffix(".md").removesuffix("/index"): page}
            for page in outside().values()
            if re.fullmatch(r"results/.*/.*\.md", page)
        ],
        "API reference": [{Path(page).stem: page} for page in reference.pages() if "/api/" in page],
    }

    def fill(entries: list[Any]) -> None:
        for entry in entries:
            for title, below in entry.items() if isinstance(entry, dict) else ():
                if isinstance(below, list):
                    fill(below)
                    below.extend(lists.get(title, []))

    fill(config.nav or [])
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and those from outside this folder."""
    for address, text in generated().items():
        files.append(File.generated(config, address, content=text))
    for path, address in outside().items():
        files.append(File.generated(config, address, content=(ROOT / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository to where the site has them."""
    address = page.file.src_uri
    if address == "methods.md":  # the table links each preset to its page
        markdown = re.sub(r"^\| `(\w+)` \|", r"| [`\1`](methods/\1.md) |", markdown, flags=re.MULTILINE)
    return relinked(markdown, address)
