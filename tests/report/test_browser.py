"""The page in a real browser: nothing complains, tabs and tables work, narrow windows do not scroll sideways."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from codec_dist.report import build_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0", "--dump-dom",
]  # fmt: skip

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium was found: install it to test the page in it")


def visit(page: Path, profile: Path, width: int = 1300) -> tuple[str, list[str]]:
    """The document after its scripts ran, and what the console said."""
    command = [str(BROWSER), *OPTIONS, f"--window-size={width},900", f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, re.findall(r":CONSOLE.*?\] (.*)", done.stderr)


def probe(page: Path, script: str, target: Path) -> Path:
    """A copy of the page that may run one more script, whose result is written into the document's title."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    target.write_text(
        text.replace("</body>", f"<script>document.title = String((() => {{{script}}})());</script></body>")
    )
    return target


def title(document: str) -> str:
    found = re.search(r"<title>(.*?)</title>", document, re.DOTALL)
    assert found is not None
    return found[1]


def test_a_broken_page_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text("<!doctype html><title>t</title><script>nonsense();</script>")
    _, console = visit(page, tmp_path / "profile")
    assert any("nonsense is not defined" in line for line in console)


def test_a_page_that_would_load_something_is_noticed(make_run: Any, tmp_path: Path) -> None:
    run = make_run()
    page = build_report(run.directory, run.config)
    page.write_text(page.read_text().replace("</body>", '<img src="https://example.org/x.png"></body>'))
    _, console = visit(page, tmp_path / "profile")
    assert any("Content Security Policy" in line for line in console)


@pytest.mark.parametrize("stages", [("extract", "train", "summarize", "intervene", "visualize"), ("extract",), ()])
def test_page_opens_without_console_messages_and_its_script_runs(
    make_run: Any, tmp_path: Path, stages: tuple[str, ...]
) -> None:
    run = make_run(stages=stages)
    document, console = visit(build_report(run.directory, run.config), tmp_path / "profile")
    assert console == []
    assert re.search(r'<html[^>]* class="js"', document)
    if "visualize" in stages:
        panels = re.findall(r'<div class="panel"[^>]*>', document)
        assert len(panels) == 6
        assert sum("hidden" in panel for panel in panels) == 4  # one of three is in sight, in both sections


def test_markup_in_the_data_does_not_run(make_run: Any, tmp_path: Path) -> None:
    bad = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    words = type(make_run(stages=[]).words)(name=bad, classes=[bad] * 3, key=bad.replace("{", "") + "{}")
    run = make_run(words=words, name="hostile")
    document, console = visit(build_report(run.directory, run.config), tmp_path / "profile")
    assert console == []
    assert not title(document).startswith("owned")


def test_tabs_follow_the_pointer_and_the_keyboard(make_run: Any, tmp_path: Path) -> None:
    run = make_run()
    script = """
        const tabs = [...document.querySelectorAll("#gallery [role=tab]")];
        const shown = () => [...document.querySelectorAll("#gallery .panel")].map((one) => one.hidden ? 0 : 1).join("");
        const seen = [shown()];
        tabs[0].click(); seen.push(shown());
        tabs[0].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true })); seen.push(shown());
        seen.push(document.activeElement === tabs[1]);
        return seen.join(" ");
    """
    page = probe(build_report(run.directory, run.config), script, tmp_path / "probe.html")
    document, console = visit(page, tmp_path / "profile")
    assert console == []
    assert title(document) == "001 100 010 true"


def test_tables_sort_by_number_both_ways(make_run: Any, tmp_path: Path) -> None:
    run = make_run()
    script = """
        const table = document.querySelector("table.sortable");
        const column = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent.trim() === "EV");
        const values = () => [...table.tBodies[0].rows].map((row) => row.cells[column].textContent);
        table.tHead.rows[0].cells[column].querySelector("button").click();
        const up = values();
        table.tHead.rows[0].cells[column].querySelector("button").click();
        return [...up, ...values()].join(" ");
    """
    page = probe(build_report(run.directory, run.config), script, tmp_path / "probe.html")
    document, _ = visit(page, tmp_path / "profile")
    assert title(document) == "0.700 0.700 0.800 0.800 0.900 0.900 0.900 0.900 0.800 0.800 0.700 0.700"


def test_the_reader_chooses_light_or_dark(make_run: Any, tmp_path: Path) -> None:
    run = make_run(stages=())
    script = """
        const paper = () => getComputedStyle(document.body).backgroundColor;
        const before = paper();
        document.querySelector("button.theme").click();
        const other = paper();
        document.querySelector("button.theme").click();
        return [before !== other, before === paper()].join(" ");
    """
    page = probe(build_report(run.directory, run.config), script, tmp_path / "probe.html")
    document, _ = visit(page, tmp_path / "profile")
    assert title(document) == "true true"


@pytest.mark.parametrize("width", [500, 1300])
def test_no_window_needs_to_be_scrolled_sideways(make_run: Any, tmp_path: Path, width: int) -> None:
    run = make_run()
    script = "return document.documentElement.scrollWidth - document.documentElement.clientWidth;"
    page = probe(build_report(run.directory, run.config), script, tmp_path / "probe.html")
    document, _ = visit(page, tmp_path / "profile", width)
    assert title(document) == "0"


def test_text_contrasts_with_what_it_stands_on(make_run: Any, tmp_path: Path) -> None:
    """WCAG AA: 4.5 to 1 for the text colours of the style sheet, in light and in dark mode."""
    run = make_run(stages=())
    script = """
        const linear = (value) => value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
        const light = (rgb) => rgb.match(/\\d+/g).slice(0, 3).map((value) => linear(value / 255))
            .reduce((sum, value, place) => sum + value * [.2126, .7152, .0722][place], 0);
        const sample = document.body.appendChild(document.createElement("i"));
        const rgb = (name) => { sample.style.color = `var(--${name})`; return getComputedStyle(sample).color; };
        const contrast = (one, other) => {
            const [low, high] = [light(rgb(one)), light(rgb(other))].sort((a, b) => a - b);
            return (high + .05) / (low + .05);
        };
        const pairs = [["ink", "paper"], ["soft", "paper"], ["soft", "card"], ["soft", "wash"],
            ["contribution", "card"], ["activation", "card"], ["random", "card"], ["other", "card"],
            ["good", "good-wash"], ["half", "half-wash"], ["bad", "bad-wash"]];
        const weak = [];
        for (const theme of ["light", "dark"]) {
            document.documentElement.dataset.theme = theme;
            for (const [one, other] of pairs) {
                const found = contrast(one, other);
                if (!(found >= 4.5)) weak.push(`${theme}: ${one} on ${other} ${found.toFixed(2)}`);
            }
        }
        return weak.length ? weak.join("; ") : "all";
    """
    page = probe(build_report(run.directory, run.config), script, tmp_path / "probe.html")
    document, _ = visit(page, tmp_path / "profile")
    assert title(document) == "all"
