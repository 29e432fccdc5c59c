"""A real ImageNet network and photographs at hand."""

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.photographs import STAMPS, Stamps, imagenet_photographs
from benchmarks.published import load_network
from codec_dist.models import Preprocessing

__all__ = ["load_network", "photographs", "stamps"]

LITE0 = Preprocessing(size=224, resize=256, interpolation="bicubic", channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)


def photographs(preprocessing: Preprocessing = LITE0) -> tuple[Tensor, Tensor]:
    """The 20 photographs of ImageNet that foolbox ships, and their classes.

    Returns:
        Normalised images [20, channel, height, width] and labels [20], int64, from 0 to 999.
    """
    found = imagenet_photographs()
    return torch.stack([preprocessing(each.image) for each in found]), torch.tensor([each.label for each in found])


def stamps(folder: Path = STAMPS, count: int = 100, seed: int = 0, preprocessing: Preprocessing = LITE0) -> Tensor:
    """The first ``count`` photographs of objects on random backgrounds, without labels.

    Returns:
        Normalised images [count, channel, height, width]; more of them begin with the same.
    """
    made = _stamps(Path(folder), preprocessing, seed)
    return torch.stack([preprocessing(picture) for picture in made.pictures(count)])


def _stamps(folder: Path, preprocessing: Preprocessing, seed: int) -> Stamps:
    # As large as images are before the central crop, so that they are not resized again.
    return Stamps(folder, int(preprocessing.resize), int(preprocessing.size), seed)
