"""From the words of a command line to one call, and from any fault to one line and an exit code."""

import os
import sys
import traceback
from collections.abc import Sequence

from codec_dist.cli.parser import build_parser, split_overrides
from codec_dist.utils import CodecError

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    0: everything asked was done. 1: a fault of the software. 2: bad input, named in one line on stderr.
    130: interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
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
        return _fail("interrupted: the same command goes on where it stopped", INTERRUPTED, debug)
    except BrokenPipeError:
        # The reader of our output left (`| head`); leave quietly, as other commands do.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (CodecError, OSError) as error:
        return _fail(f"error: {_words(error)}", BAD_INPUT, debug)
    except Exception as error:  # noqa: BLE001  the last resort: a line instead of a screenful
        from codec_dist.models import model_line

        if line := model_line(error):
            return _fail(f"error: {line} (--debug shows where)", BAD_INPUT, debug)
        return _fail(f"internal error: {type(error).__name__}: {_words(error)} (--debug shows where)", FAILED, debug)


def _fail(line: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(line, file=sys.stderr, flush=True)
    return code


def _words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return " ".join(str(error).split()) or type(error).__name__
