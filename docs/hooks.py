"""What makes a site of pages that are written for GitHub: links out of docs/ lead to pages made of those files."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]

PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages outside docs/, and what the site has in their place; README's is docs/index.md."""

LANGUAGES = {".py": "python", ".json": "json", ".yaml": "yaml", ".yml": "yaml", ".md": "markdown", ".toml": "toml"}

_LINK = re.compile(r"(?<=\]\()(?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Files, *, config: MkDocsConfig, **_: Any) -> Files:
    """Add the pages outside docs/, and one for every file of the repository that a page links to."""
    for source, target in PAGES.items():
        if source != "README.md":
            text = rewritten((ROOT / source).read_text(encoding="utf-8"), "")
            files.append(File.generated(config, target, content=text))
    pages = [file for file in files if file.is_documentation_page()]
    linked = {path for file in pages for path in re.findall(r"(?<=\]\(source/)[^)#]+(?=\.md\))", page_text(file))}
    for path in sorted(linked):
        files.append(File.generated(config, f"source/{path}.md", content=source_page(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Rewrite the page's links out of docs/; those of generated pages are so already."""
    return markdown if page.file.generated_by else rewritten(markdown, "docs")


def page_text(file: File) -> str:
    """The Markdown of a page, its links rewritten."""
    return file.content_string if file.generated_by else rewritten(file.content_string, "docs")


def rewritten(markdown: str, folder: str) -> str:
    """Markdown with links for the site.

    Args:
        markdown: of a page in `folder` of the repository, "docs" or "".
    Returns:
        the same; what lies in docs/ is linked there, PAGES as they are named in the site, files as pages in source/.
        Links to folders, and to what does not exist, stay as they are, and mkdocs complains about them.
    """

    def link(found: re.Match[str]) -> str:
        path, anchor = posixpath.normpath(posixpath.join(folder, found["path"])), found["anchor"] or ""
        if path.startswith("docs/"):
            return path.removeprefix("docs/") + anchor
        if path in PAGES:
            return PAGES[path] + anchor
        return f"source/{path}.md" if (ROOT / path).is_file() else found[0]

    return _LINK.sub(link, markdown)


def source_page(path: str) -> str:
    """A page that shows a file of the repository."""
    text = (ROOT / path).read_text(encoding="utf-8")
    fence = "`" * (1 + max(map(len, re.findall(r"`{3,}", text)), default=2))
    language = LANGUAGES.get(Path(path).suffix, "bash")
    front = f"---\ntitle: {path}\nsearch:\n  exclude: true\n---\n"
    return f"{front}\n# {path}\n\n{fence}{language}\n{text.rstrip()}\n{fence}\n"
