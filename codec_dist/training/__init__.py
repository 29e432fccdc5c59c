"""Training of sparse autoencoders on a contribution store, many at once, by Ray Train (docs/saes.md)."""

from codec_dist.training.errors import TrainingError
from codec_dist.training.launch import TrainedSae, train_saes
from codec_dist.training.model_selection import select_saes
from codec_dist.training.parts import check_parts
from codec_dist.training.sae_jobs import GridPoint, check_training, expand_grid
from codec_dist.training.saving import LEFT_OUT_FILE, LeftOut, read_left_out

__all__ = [
    "LEFT_OUT_FILE",
    "GridPoint",
    "LeftOut",
    "TrainedSae",
    "TrainingError",
    "check_parts",
    "check_training",
    "expand_grid",
    "read_left_out",
    "select_saes",
    "train_saes",
]
