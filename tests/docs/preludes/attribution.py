# What docs/attribution.md takes for granted: a network with blocks called as in ResNet-50, and images.
import torch
from torch import nn


class BasicBlock(nn.Sequential):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU())


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer4 = nn.Sequential(BasicBlock(3, 8), BasicBlock(8, 8), BasicBlock(8, 100))
        self.fc = nn.Linear(100, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layer4(images).mean(dim=(2, 3)))


model = Network()
images = torch.randn(2, 3, 16, 16)
