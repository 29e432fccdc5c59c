"""What the docs site (mkdocs.yml) needs beside the pages: README and results as pages, and docstrings in Markdown."""

import ast
import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

from griffe import Expr, ExprSubscript, ExprTuple, Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

logger = logging.getLogger("mkdocs.hooks.docs_site")

ROOT = Path(__file__).parent.parent
GENERATED = {"index.md": "README.md", "results.md": "benchmarks/RESULTS.md"}
"""Page of the site → file of the repository that it shows."""
LINK = re.compile(r"(?P<mark>!?)\[(?P<text>[^\]]*)\]\((?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")
PACKAGE = re.compile(r"^::: (codec_dist\.\w+)$", re.MULTILINE)
SHAPED = ("Float", "Int", "Bool", "UInt8", "Shaped")
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


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Warn of public classes and functions that a page of the API leaves out: they have no docstring."""
    del config, files
    for package in PACKAGE.findall(page.markdown or ""):
        for name in _public_names(ROOT / package.replace(".", "/")):
            if f'id="{package}.{name}"' not in html:
                logger.warning(
                    "%s: %s.%s is public and not shown: give it a docstring", page.file.src_uri, package, name
                )
    return html


def _public_names(package: Path) -> list[str]:
    """What ``__all__`` lists, without constants and without functions that a module of the same name hides."""
    tree = ast.parse((package / "__init__.py").read_text("utf-8"))
    listed = next(
        ast.literal_eval(statement.value)
        for statement in tree.body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__"
    )
    return [name for name in listed if not name.isupper() and not (package / f"{name}.py").exists()]


class PlainRoles(Extension):
    """Shows ``:class:`Name``` in docstrings as the name alone, and the dimensions of tensors as they are written."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring and the annotations of each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\g<name>`", obj.docstring.value)
        annotations = [getattr(obj, name, None) for name in ("annotation", "returns")]
        for annotation in [*annotations, *(parameter.annotation for parameter in getattr(obj, "parameters", ()))]:
            _quote_dimensions(annotation)


def _quote_dimensions(annotation: object) -> None:
    """Make strings of dimensions again: griffe takes the ``"batch"`` of ``Float[Tensor, "batch"]`` for a class."""
    if not isinstance(annotation, Expr):
        return
    if isinstance(annotation, ExprSubscript) and isinstance(annotation.slice, ExprTuple):
        elements = annotation.slice.elements
        if str(annotation.left) in SHAPED and len(elements) == 2 and "'" not in str(elements[1]):
            elements[1] = f"'{elements[1]}'"
    for field in dataclasses.fields(annotation):
        value = getattr(annotation, field.name)
        for part in value if isinstance(value, list | tuple) else [value]:
            _quote_dimensions(part)
