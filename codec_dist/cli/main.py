"""From the words of a command line to one call, and from any error to one line and an exit code."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from codec_dist.cli.interruption import Interruption, orderly_interruption
from codec_dist.cli.parser import build_parser, split_overrides
from codec_dist.cli.streams import clean_streams
from codec_dist.utils import CodecError, DiskFullError, full_disk

OK, FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
GOES_ON = "the same command goes on where it stopped"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    0: everything requested was done. 1: an error in the software. 2: bad input, named in one line on stderr.
    130: interrupted by Ctrl-C. 143: ended by SIGTERM, as from Slurm, `timeout` or `ray job stop`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    with _logging(debug), clean_streams(), orderly_interruption() as interruption:
        return _run(words, debug, interruption)


def _run(words: list[str], debug: bool, interruption: Interruption) -> int:
    try:
        words, overrides = split_overrides([word for word in words if word != "--debug"])
        parsed = build_parser().parse_args(words)
        if overrides and not parsed.takes_overrides:
            raise CodecError(f"{overrides[0]} is not an option here: only commands that read a CONFIG take it")
        parsed.overrides = overrides
        result = parsed.call(parsed)
        sys.stdout.flush()
        return result if isinstance(result, int) else OK
    except KeyboardInterrupt:
        if interruption.signal == signal.SIGTERM:
            return _fail(f"ended by SIGTERM: {GOES_ON}", TERMINATED, debug)
        return _fail(f"interrupted: {GOES_ON}", INTERRUPTED, debug)
    except BrokenPipeError:
        # The reader of our output left (`| head`); leave quietly, as other commands do.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (CodecError, OSError) as error:
        return _fail(f"error: {_words(error)}", BAD_INPUT, debug)
    except Exception as error:  # noqa: BLE001  the last resort: a line instead of a screenful
        from codec_dist.models import model_line

        if full_disk(error) is not None:
            return _fail(f"error: {_words(error)}", BAD_INPUT, debug)
        if line := model_line(error):
            return _fail(f"error: {line} (--debug shows where)", BAD_INPUT, debug)
        return _fail(f"internal error: {type(error).__name__}: {_words(error)} (--debug shows where)", FAILED, debug)


@contextmanager
def _logging(debug: bool) -> Iterator[None]:
    """With --debug, the loggers of the package pass everything on, which the Ray session heeds, too."""
    logger = logging.getLogger("codec_dist")
    before = logger.level
    if debug:
        logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(before)


def _fail(line: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(line, file=sys.stderr, flush=True)
    return code


def _words(error: BaseException) -> str:
    if not isinstance(error, CodecError) and (reason := full_disk(error)) is not None:
        path = getattr(error, "filename", None) or "a file of this command"
        return str(DiskFullError(path, reason))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return " ".join(str(error).split()) or type(error).__name__
