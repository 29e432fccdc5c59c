"""The project's Markdown pages and notebooks, taken apart: code blocks, headings, links."""

import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,}|~{3,})[ \t]*(?P<language>[\w+-]*)(?P<more>.*)$")
NOT_RUN = re.compile(r"^ *<!-- not run: (?P<reason>.+?) -->$")
HEADING = re.compile(r"^(#{1,6})[ \t]+(.+?)[ \t]*#*$")
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\((?P<target>[^()\s]+(?:\([^()]*\)[^()\s]*)?)(?:\s+\"[^\"]*\")?\)")
REFERENCE = re.compile(r"^ {0,3}\[[^\]]+\]:[ \t]+(?P<target>\S+)")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page, or one code cell of a notebook."""

    language: str
    code: str
    line: int
    """Line of the page (from 1) where the code begins; of a notebook, the number of the cell."""
    not_run: str | None = None
    """Why it is not run, where a comment ``<!-- not run: REASON -->`` before it says so."""


def pages() -> list[Path]:
    """All pages whose links and code are promised to work."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md")]
    return [*(page for page in top if page.exists()), *sorted((ROOT / "docs").rglob("*.md"))]


def notebooks() -> list[Path]:
    """All notebooks."""
    return sorted((ROOT / "examples").glob("*.ipynb"))


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a Markdown page, or the code cells of a notebook."""
    if page.suffix == ".ipynb":
        cells = json.loads(page.read_text("utf-8"))["cells"]
        return [
            Block("python", "".join(cell["source"]), number)
            for number, cell in enumerate(cells, 1)
            if cell["cell_type"] == "code"
        ]
    return list(_parts(page)[0])


def prose(page: Path) -> list[str]:
    """The lines of a page outside of fenced blocks, with inline code emptied."""
    return [re.sub(r"`+[^`]*`+", "``", line) for line in _parts(page)[1]]


def links(page: Path) -> list[str]:
    """Targets of all links and pictures of a page, as written."""
    lines = prose(page)
    inline = [match["target"] for match in LINK.finditer("\n".join(lines))]
    return inline + [match["target"] for line in lines if (match := REFERENCE.match(line))]


def anchors(page: Path) -> set[str]:
    """What can stand behind ``#``: a name for each heading, as GitHub makes it, and explicit ids."""
    found: dict[str, int] = {}
    names: set[str] = set()
    for line in _parts(page)[1]:
        if match := HEADING.match(line):
            name = slug(match[2])
            count = found.get(name, 0)
            found[name] = count + 1
            names.add(f"{name}-{count}" if count else name)
        names.update(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", line))
    return names


def slug(heading: str) -> str:
    """GitHub's anchor of a heading: letters, digits, ``-`` and ``_``, lower case, spaces as ``-``."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    text = unicodedata.normalize("NFC", re.sub(r"[`*]", "", text)).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def _text(page: Path) -> str:
    """A page's Markdown; of a notebook that of its text cells."""
    if page.suffix != ".ipynb":
        return page.read_text("utf-8")
    cells = json.loads(page.read_text("utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def _parts(page: Path) -> tuple[list[Block], list[str]]:
    found: list[Block] = []
    outside: list[str] = []
    inside: list[str] = []
    opened: re.Match[str] | None = None
    start, reason = 0, None
    for number, line in enumerate(_text(page).splitlines(), 1):
        fence = FENCE.match(line)
        if opened is not None:
            if (
                fence
                and not fence["language"]
                and not fence["more"].strip()
                and fence["marks"].startswith(opened["marks"])
            ):
                indent = len(opened["indent"])
                code = "".join(f"{one[indent:] if not one[:indent].strip() else one}\n" for one in inside)
                found.append(Block(opened["language"], code, start, reason))
                opened, reason = None, None
            else:
                inside.append(line)
        elif fence:
            opened, start, inside = fence, number + 1, []
        else:
            outside.append(line)
            if line.strip():
                marker = NOT_RUN.match(line)
                reason = marker["reason"] if marker else None
    if opened is not None:
        raise ValueError(f"{page}: the block that begins in line {start - 1} does not end")
    return found, outside
