"""Networks so small that everything around them is what takes the time."""

from collections import OrderedDict

from torch import nn


def minimal(classes: int = 10, channels: int = 3, stride: int = 2) -> nn.Sequential:
    """Two convolutions (``first``, ``second``; 8 and 16 channels), mean pooling, and a read-out.

    ``stride`` is that of the first convolution; the second's is 2.
    """
    return nn.Sequential(
        OrderedDict(
            first=nn.Sequential(nn.Conv2d(channels, 8, 3, stride, 1), nn.ReLU()),
            second=nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(16, classes),
        )
    )
