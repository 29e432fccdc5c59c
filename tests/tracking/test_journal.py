"""metrics.jsonl: whole lines, whatever happened before."""

import json
import multiprocessing
from pathlib import Path

from codec_dist.tracking import MetricsJournal, read_metrics


def test_a_line_cut_by_a_crash_damages_no_later_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"n": 0}\n{"n": 1, "met')
    with MetricsJournal(path) as journal:
        journal.write({"n": 2})
    assert [entry["n"] for entry in read_metrics(path)] == [0, 2]


def test_values_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsJournal(path) as journal:
        journal.write({"values": [float("nan"), float("inf"), 1.5]})
    (line,) = path.read_text().splitlines()
    assert json.loads(line, parse_constant=lambda name: 1 / 0)["values"] == [None, None, 1.5]


def test_lines_of_two_processes_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(path, writer)) for writer in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(path.read_text().splitlines()) == len(list(read_metrics(path))) == 400


def test_a_missing_journal_has_no_entries(tmp_path: Path) -> None:
    assert list(read_metrics(tmp_path / "none")) == []


def _write_many(path: Path, writer: int) -> None:
    with MetricsJournal(path) as journal:
        for number in range(200):
            journal.write({"writer": writer, "number": number, "padding": "x" * 500})
