"""The demo's classifier with a layer that contributes nothing."""

from torch import Tensor, nn

from codec_dist.demo.classifier import DigitsClassifier


class MuteClassifier(DigitsClassifier):
    """``mute`` gives its input to the read-out times zero: activations, but no gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.mute = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.blocks(self.stem(images)).mean(dim=(2, 3))
        return self.head(hidden) + 0 * self.mute(hidden)[:, :10]


def mute_classifier() -> MuteClassifier:
    """The same outputs as those of ``digits_classifier``."""
    return MuteClassifier()
