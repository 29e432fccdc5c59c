"""metrics.jsonl and the framing of offline files: whole lines and whole payloads, whatever happened before."""

import json
import multiprocessing
import struct
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from codec_dist.tracking import MetricsJournal, read_metrics
from codec_dist.tracking.wandb_runs import is_complete, read_payloads


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


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 100_000), max_size=6), st.integers(0, 1000))
def test_payloads_of_any_size_are_read_back_and_a_torn_one_is_left_out(sizes: list[int], cut: int) -> None:
    payloads = [bytes([number + 1]) * size for number, size in enumerate(sizes)]
    content = _framed(payloads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.wandb"
        path.write_bytes(content)
        assert list(read_payloads(path)) == payloads
        path.write_bytes(content[: max(len(content) - 1 - cut, 7)])
        torn = list(read_payloads(path))
        assert torn == payloads[: len(torn)]
        assert len(torn) < max(len(payloads), 1)
        assert not is_complete(path)


def _framed(payloads: list[bytes]) -> bytes:
    """The framing, written down as LevelDB's documentation states it (checksums left 0: not read here)."""
    content = bytearray(b":W&B\0\0\0")
    for payload in payloads:
        first, rest = True, payload
        while True:
            room = 32768 - len(content) % 32768
            if room < 7:
                content += b"\0" * room
                room = 32768
            part, rest = rest[: room - 7], rest[room - 7 :]
            kind = (1 if first else 4) if not rest else (2 if first else 3)
            content += struct.pack("<IHB", 0, len(part), kind) + part
            first = False
            if not rest:
                break
    return bytes(content)


def _write_many(path: Path, writer: int) -> None:
    with MetricsJournal(path) as journal:
        for number in range(200):
            journal.write({"writer": writer, "number": number, "padding": "x" * 500})
