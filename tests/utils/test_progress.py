"""Progress tells what is done, on a terminal and off it."""

import io
import os
import pty

from codec_dist.utils import Progress


def test_off_a_terminal_the_last_line_states_the_total() -> None:
    stream = io.StringIO()
    with Progress("extract", total=12, unit="images", stream=stream) as progress:
        progress.advance(5)
        progress.advance(7, note="2 actors")
    lines = stream.getvalue().splitlines()
    assert lines[-1].startswith("extract: 12 of 12 images")
    assert lines[-1].endswith("2 actors")
    assert len(lines) == 1


def test_resumed_work_does_not_inflate_the_rate() -> None:
    stream = io.StringIO()
    with Progress("extract", total=10**9, unit="images", done=10**9 - 1, stream=stream) as progress:
        progress.advance(1)
    rate = float(stream.getvalue().split(", ")[1].split(" ")[0].replace(",", ""))
    assert rate < 10**7


def test_on_a_terminal_a_bar_is_drawn() -> None:
    controller, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream:
        with Progress("extract", total=3, unit="images", stream=stream) as progress:
            progress.advance(3)
        drawn = ""
        while "100%" not in drawn:
            drawn += os.read(controller, 10_000).decode()
    os.close(controller)
    assert "extract:" in drawn
    assert "3/3" in drawn
