"""The error of this package, and one line for whatever a model's own code raises."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from codec_dist.utils import CodecError

# Commands to a terminal: colours and cursor moves, titles and links, and the short ones.
ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|.)")
SCRIPT_PREAMBLE = "The following operation failed in the TorchScript"
LONGEST_REASON = 300
RAISED = "the model raised"


class ModelError(CodecError):
    """A model, its weights, its preprocessing or one of its layers is not as requested."""


@contextmanager
def model_call(doing: str) -> Iterator[None]:
    """What a model's own code raises in this block is noted as such, and stays what it is.

    Args:
        doing: what the model was used for, such as "it computed a batch of 8 images".
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, CodecError) and model_line(error) is None:
            error.add_note(f"{RAISED} {type(error).__name__} while {doing}: {reason_of(error)}")
        raise


def model_line(error: BaseException) -> str | None:
    """The line "the model raised … while …" of an error that a model's own code raised; None for others."""
    return next((note for note in getattr(error, "__notes__", ()) if note.startswith(RAISED)), None)


def printable(text: str) -> str:
    """A text of unknown origin without what would act on a terminal, on one line."""
    return "".join(each if each.isprintable() else " " for each in ESCAPES.sub("", text))


def reason_of(error: BaseException) -> str:
    """The line of an error's message that says most, without terminal escapes; its type where it says nothing."""
    lines = [line for line in (printable(each).strip() for each in str(error).splitlines()) if line]
    if not lines:
        return type(error).__name__
    line = lines[-1] if lines[0].startswith(SCRIPT_PREAMBLE) else lines[0]
    return line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON] + " …"
