"""Links between pages lead somewhere, and the words of the pages are explained."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from docs_pages import ROOT, anchors, blocks, links, notebooks, pages, slug


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [*pages(), *notebooks()], ids=_name)
def test_links_and_anchors_resolve(page: Path) -> None:
    broken = []
    for target in links(page):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        place = (page.parent / path).resolve() if path else page
        found = place.exists() and place.is_relative_to(ROOT)
        if not found or (anchor and (place.suffix != ".md" or anchor not in anchors(place))):
            broken.append(target)
    assert not broken


def test_sections_that_docstrings_cite_are_in_the_method_page() -> None:
    headings = anchors(ROOT / "docs" / "method.md")
    cited = set()
    for module in (ROOT / "codec_dist").rglob("*.py"):
        cited |= set(re.findall(r"(?:METHOD|method\.md`*) §(\d+(?:\.\d+)*)", module.read_text("utf-8")))
    assert cited
    assert not [
        number for number in cited if not any(re.match(f"{number.replace('.', '')}-", each) for each in headings)
    ]


def test_every_page_is_in_the_site() -> None:
    listed = (ROOT / "mkdocs.yml").read_text("utf-8")
    missing = [
        page.name for page in (ROOT / "docs").rglob("*.md") if page.relative_to(ROOT / "docs").as_posix() not in listed
    ]
    assert not missing


def test_page_is_taken_apart_as_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One & two: `three`\n[a](b.md#c) `[not](a-link.md)`\n\n"
        "<!-- not run: it needs a network -->\n```python\nopen('# no heading')\n```\n\n"
        "- item\n\n  ```python\n  if True:\n      pass\n  ```\n\n~~~text\n[x](y)\n~~~\n## One\n## One\n",
        "utf-8",
    )
    first, second, third = blocks(page)
    assert (first.code, first.line, first.not_run) == ("open('# no heading')\n", 6, "it needs a network")
    assert (second.code, second.not_run) == ("if True:\n    pass\n", None)
    assert third.language == "text"
    assert links(page) == ["b.md#c"]
    assert anchors(page) == {"one--two-three", "one", "one-1"}


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [("`model.spec` and `model.options`", "modelspec-and-modeloptions"), ("W&B's environment", "wbs-environment")],
)
def test_anchor_is_that_of_github(heading: str, anchor: str) -> None:
    assert slug(heading) == anchor
