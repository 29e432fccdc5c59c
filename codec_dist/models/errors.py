"""Errors of this package, and one line for whatever a model's own code raises."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from codec_dist.utils import CodecError

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SCRIPT_PREAMBLE = "The following operation failed in the TorchScript"
LONGEST_REASON = 300


class ModelError(CodecError):
    """A model, its weights, its preprocessing or one of its layers is not as requested."""


class ModelRaisedError(ModelError):
    """The code of a model raised an error; the message names it and what the model was doing."""


@contextmanager
def model_call(doing: str, passes: Callable[[Exception], bool] = lambda error: False) -> Iterator[None]:
    """Errors of a model's own code become one line: "the model raised … while ``doing``".

    Args:
        doing: what the model was used for, such as "it computed a batch of 8 images".
        passes: errors for which this is true are raised as they are, such as a lack of memory.

    Raises:
        ModelRaisedError: for whatever is raised in the block; errors of this package are raised as they are.
    """
    try:
        yield
    except CodecError:
        raise
    except Exception as error:
        if passes(error):
            raise
        raise ModelRaisedError(f"the model raised {type(error).__name__} while {doing}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """The line of an error's message that says most, without terminal escapes; its type where it says nothing."""
    lines = [line for line in map(str.strip, ESCAPES.sub("", str(error)).splitlines()) if line]
    if not lines:
        return type(error).__name__
    line = lines[-1] if lines[0].startswith(SCRIPT_PREAMBLE) else lines[0]
    return line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON] + " …"
