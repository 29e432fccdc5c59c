"""Training of sparse autoencoders on a contribution store, many at once, by Ray Train (DESIGN §8)."""

from codec_dist.training.errors import TrainingError
from codec_dist.training.selection import select_saes
from codec_dist.training.trainer import TrainedSae, train_saes

__all__ = ["TrainedSae", "TrainingError", "select_saes", "train_saes"]
