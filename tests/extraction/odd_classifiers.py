"""Classifiers of digits that are odd in one way each: how they flatten, or what their outputs depend on."""

import torch.nn.functional as F
from torch import Tensor, nn


class Odd(nn.Module):
    """A convolution, BatchNorm, ReLU and a linear layer; ``way`` says what is odd."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.Linear(4 * 49, 10)
        self.way = way

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.norm(self.conv(images)))
        if self.way == "dropout":
            hidden = F.dropout(hidden)
        if self.way == "batch":
            hidden = hidden - hidden.mean(0)
        return self.head(hidden.view(hidden.size(0), -1) if self.way == "view" else hidden.flatten(1))


def viewing() -> nn.Module:
    """Flattens as LeNets do, which tensors in channels_last refuse."""
    return Odd("view")


def random() -> nn.Module:
    """Drops units in evaluation mode, too."""
    return Odd("dropout")


def mixing() -> nn.Module:
    """Subtracts the mean over the batch."""
    return Odd("batch")
