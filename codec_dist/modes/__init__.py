"""What modes say about classes: correlations, specificity, coverage, best images (METHOD §5)."""

from codec_dist.modes.correlations import Correlations, LoadingCorrelations
from codec_dist.modes.errors import ModesError

__all__ = ["Correlations", "LoadingCorrelations", "ModesError"]
