"""A network that knows without training what it is shown: the class of a picture is its brightness."""

from typing import ClassVar

import torch
from torch import Tensor, nn


class BrightnessClassifier(nn.Module):
    """Tells grey levels 0, 20, 40, ... apart: logits 2cm - c², highest for the level c nearest to the mean m."""

    preprocessing: ClassVar = {"size": 8, "channels": 1, "mean": [0.0], "std": [1.0]}

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)
        self.head = nn.Linear(1, outputs)
        levels = torch.arange(outputs) * 20 / 255
        with torch.no_grad():
            self.layer.weight.fill_(1)
            self.layer.bias.zero_()
            self.head.weight.copy_(2 * levels[:, None])
            self.head.bias.copy_(-(levels**2))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layer(images).mean(dim=(2, 3)))


def brightness_classifier(outputs: int = 10) -> BrightnessClassifier:
    """The network for as many grey levels."""
    return BrightnessClassifier(outputs)
