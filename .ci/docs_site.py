"""What the docs site (mkdocs.yml) needs beside the pages: README and results as pages, and docstrings in Markdown."""

import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
GENERATED = {"index.md": "README.md", "results.md": "benchmarks/RESULTS.md"}
"""Page of the site → file of the repository that it shows."""
LINK = re.compile(r"(?P<mark>!?)\[(?P<text>[^\]]*)\]\((?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")
ROLE = re.compile(r":(?:class|func|meth|attr|mod|data|exc):`~?(?P<name>[^`]+)`")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose files lie outside of docs/."""
    for page, source in GENERATED.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to pages of the site, and name what is not in it."""
    del config, files
    place = page.file.src_uri
    source = ROOT / GENERATED.get(place, f"docs/{place}")
    shown = {(ROOT / path).resolve(): name for name, path in GENERATED.items()}

    def relinked(link: re.Match[str]) -> str:
        target = (source.parent / link["path"]).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return link[0]
        docs = ROOT / "docs"
        if target in shown or target.is_relative_to(docs):
            name = shown.get(target) or target.relative_to(docs).as_posix()
            return f"{link['mark']}[{link['text']}]({'../' * place.count('/')}{name}{link['anchor'] or ''})"
        path = target.relative_to(ROOT).as_posix()
        text = link["text"].strip("`")
        return f"`{path}`" if text.strip("/") in (path, target.name) else f"{link['text']} (`{path}`)"

    return LINK.sub(relinked, markdown)


class PlainRoles(Extension):
    """Shows ``:class:`Name``` in docstrings as the name alone."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\g<name>`", obj.docstring.value)
