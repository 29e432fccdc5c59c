"""Every Python block of the pages runs, and the notebook finds what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from docs_pages import ROOT, blocks, notebooks, pages

from codec_dist.config import parse_config

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
WITH_CODE = [page for page in [*pages(), *notebooks()] if any(block.language == "python" for block in blocks(page))]


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of all pages, run one after the other in one process."""
    folder = tmp_path_factory.mktemp("pages")
    command = [sys.executable, Path(__file__).with_name("run_pages.py"), folder / "results.json", folder / "run"]
    # Fast on any machine only if threads do not wait for each other; and nothing may be downloaded.
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, *map(_name, WITH_CODE)], check=True, env=os.environ | environment, cwd=folder)
    return json.loads((folder / "results.json").read_text("utf-8"))


@pytest.mark.parametrize("name", [_name(page) for page in WITH_CODE])
def test_code_of_page_runs(results: dict[str, Any], name: str) -> None:
    found = results[name]
    assert found["error"] is None, found["error"]
    assert found["blocks"] == sum(each.language == "python" and each.not_run is None for each in blocks(ROOT / name))


@pytest.mark.parametrize("page", pages(), ids=_name)
def test_block_that_is_not_run_says_why(page: Path) -> None:
    for block in blocks(page):
        assert block.not_run is None or len(block.not_run.split()) >= 3, f"{page}:{block.line}"


@pytest.mark.parametrize("page", pages(), ids=_name)
def test_config_of_page_is_one(page: Path) -> None:
    needed: dict[str, Any] = {"run": {"directory": "run"}, "data": {"shards": "shards"}, "model": {"spec": "timm:x"}}
    for block in blocks(page):
        if block.language == "yaml":
            values = yaml.safe_load(block.code)
            parse_config({**needed, **values}, f"{_name(page)}, line {block.line}")


def test_every_how_to_ends_with_code_that_runs() -> None:
    for page in (ROOT / "docs" / "howto").glob("*.md"):
        last = blocks(page)[-1]
        assert last.language == "python", page
        assert last.not_run is None, page
        assert page.read_text("utf-8").rstrip().endswith("```"), page


def test_ablating_the_modes_of_a_class_hurts_it_more_than_random_channels(results: dict[str, Any]) -> None:
    found = results[_name(NOTEBOOK)]["values"]
    accuracy: list[dict[str, float]] = found["accuracy"]
    assert [row["class"] for row in accuracy] == list(range(10))
    # The network reads digits in the first place, and as many channels in all three columns were set to zero.
    assert min(row["intact"] for row in accuracy) > 0.8
    own, others, random = (_mean(accuracy, column) for column in ("ablated", "others", "random"))
    assert own < random - 0.1
    assert own < others - 0.1
    shown = found["digit"]
    assert accuracy[shown]["ablated"] < accuracy[shown]["random"] - 0.1


@pytest.mark.parametrize("notebook", notebooks(), ids=_name)
def test_notebook_holds_no_large_output(notebook: Path) -> None:
    assert notebook.stat().st_size < 100_000


def _mean(rows: list[dict[str, float]], column: str) -> float:
    return sum(row[column] for row in rows) / len(rows)
