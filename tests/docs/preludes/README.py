# What README.md takes for granted: a network with blocks called as in ResNet-50, images, and
# the parts of a finished run that it opens.
import numpy as np
import pyarrow as pa
import torch
from torch import nn

from codec_dist.modes import LayerModes, LoadingCorrelations, ModeSummary
from codec_dist.sae import build
from codec_dist.store import BlockWriter, create_store


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

LAYER, QUANTITY, ROWS = "layer4.2", "contribution-positive", 20
create_store(
    "runs/resnet50/store",
    identity={"model": "of the README"},
    layers={LAYER: 100},
    targets=["top_1"],
    quantities=[QUANTITY],
    shards=[("shard-000000.tar", ROWS)],
)
table = {"key": [str(row) for row in range(ROWS)], "label": pa.array([row % 2 for row in range(ROWS)], pa.int32())}
table |= {"prediction": np.zeros(ROWS, np.int64), "target_value": np.zeros(ROWS), "baseline_value": np.zeros(ROWS)}
stored = torch.rand(ROWS, 100)
BlockWriter("runs/resnet50/store").write(0, {(LAYER, QUANTITY): stored.numpy()}, pa.table(table))

trained = build("topk", {"modes": 16, "k": 4}, channels=100)
trained.save("runs/resnet50/sae/...")
found = LoadingCorrelations(modes=16, classes=2)
found.update(trained.encode(stored).detach(), torch.arange(ROWS) % 2)
entry = LayerModes(LAYER, QUANTITY, "mode", found.result(), found.result(), threshold=0.2, class_names=("cat", "dog"))
ModeSummary([entry]).save("runs/resnet50/modes")
