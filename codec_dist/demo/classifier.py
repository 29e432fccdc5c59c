"""The demo's model: a small residual network that reads handwritten digits."""

from jaxtyping import Float
from torch import Tensor, nn

WIDTHS = (32, 32, 64, 64, 128, 128)
CLASSES = 10
INPUT_SIZE = 16


class ResidualBlock(nn.Module):
    """Two convolutions with BatchNorm around a shortcut; the output is rectified in place."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.relu1 = nn.ReLU(inplace=True)
        self.relu2 = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            convolution = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(channels_out))

    def forward(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel2 height2 width2"]:
        hidden = self.relu1(self.bn1(self.conv1(images)))
        return self.relu2(self.bn2(self.conv2(hidden)) + self.shortcut(images))


class DigitsClassifier(nn.Module):
    """Six residual blocks (``blocks.0`` … ``blocks.5``), global mean pooling and a linear read-out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, WIDTHS[0], 3, 1, 1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU(inplace=True)
        )
        widths_in = (WIDTHS[0], *WIDTHS[:-1])
        strides = [2 if index in (2, 4) else 1 for index in range(len(WIDTHS))]
        self.blocks = nn.Sequential(*map(ResidualBlock, widths_in, WIDTHS, strides))
        self.head = nn.Linear(WIDTHS[-1], CLASSES)

    def forward(self, images: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch classes"]:
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))


def digits_classifier() -> DigitsClassifier:
    """The classifier with random weights; input ``[batch, 1, 16, 16]``, output 10 logits."""
    return DigitsClassifier()
