"""The demo's classifier, with which an actor waits for a second one before it computes anything."""

import os
from pathlib import Path

import ray
from torch import Tensor

from codec_dist.demo.classifier import DigitsClassifier


class MeetingClassifier(DigitsClassifier):
    """The first actor that passes images through it waits in that pass until a second one does.

    Args:
        folder: one for each run, with the pipes ``first`` and ``second``. Whoever reads ``first`` to its end knows
            that the first actor waits.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder: Path | None = Path(folder)

    def forward(self, images: Tensor) -> Tensor:
        # The driver tries the model, too, and an actor does with one blank image before it has a shard.
        if self._folder is not None and _in_an_actor() and images.any():
            self._meet(self._folder)
            self._folder = None
        return super().forward(images)

    def _meet(self, folder: Path) -> None:
        try:
            os.close(os.open(folder / "came", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            (folder / "second").write_bytes(b"")
        else:
            # A pipe opens when its other end does.
            (folder / "first").write_bytes(b"")
            (folder / "second").read_bytes()


def _in_an_actor() -> bool:
    return ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None


def meeting_classifier(folder: str) -> MeetingClassifier:
    """The same numbers as those of ``digits_classifier``."""
    return MeetingClassifier(folder)
