"""Sparse autoencoders: architectures behind one interface, their files, and their held-out metrics (METHOD §3)."""

from codec_dist.sae.autoencoder import ARCHITECTURES, Loss, SparseAutoencoder, build
from codec_dist.sae.errors import SaeError
from codec_dist.sae.metrics import ReconstructionMetrics, ReconstructionReport, coherence
from codec_dist.sae.stsae import StsaeAutoencoder
from codec_dist.sae.topk import TopKAutoencoder, geometric_median

__all__ = [
    "ARCHITECTURES",
    "Loss",
    "ReconstructionMetrics",
    "ReconstructionReport",
    "SaeError",
    "SparseAutoencoder",
    "StsaeAutoencoder",
    "TopKAutoencoder",
    "build",
    "coherence",
    "geometric_median",
]
