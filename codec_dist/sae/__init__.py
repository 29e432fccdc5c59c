"""Sparse autoencoders: architectures behind one interface, their files and held-out metrics (docs/method.md §3)."""

from codec_dist.sae.arithmetic import ALONE, Group
from codec_dist.sae.base import ARCHITECTURES, Loss, Options, SparseAutoencoder, TrainedOptions, build
from codec_dist.sae.batchtopk import BatchTopKAutoencoder, MatryoshkaAutoencoder
from codec_dist.sae.checkpoint import has_weights
from codec_dist.sae.errors import SaeError
from codec_dist.sae.gated import GatedAutoencoder
from codec_dist.sae.interop import export_sae, import_sae
from codec_dist.sae.jumprelu import JumpReluAutoencoder
from codec_dist.sae.linear import LinearAutoencoder, geometric_median
from codec_dist.sae.metrics import ReconstructionMetrics, ReconstructionReport, coherence
from codec_dist.sae.pca_nmf import FittedAutoencoder, NmfAutoencoder, PcaAutoencoder
from codec_dist.sae.relu import ReluAutoencoder
from codec_dist.sae.sharded import Joined, ProcessGroup, shard, unshard, whole_on_host
from codec_dist.sae.stacked import StackedAutoencoder
from codec_dist.sae.stsae import StsaeAutoencoder
from codec_dist.sae.topk import TopKAutoencoder
from codec_dist.sae.trained import TrainedAutoencoder, forget_moments

__all__ = [
    "ALONE",
    "ARCHITECTURES",
    "BatchTopKAutoencoder",
    "FittedAutoencoder",
    "GatedAutoencoder",
    "Group",
    "Joined",
    "JumpReluAutoencoder",
    "LinearAutoencoder",
    "Loss",
    "MatryoshkaAutoencoder",
    "NmfAutoencoder",
    "Options",
    "PcaAutoencoder",
    "ProcessGroup",
    "ReconstructionMetrics",
    "ReconstructionReport",
    "ReluAutoencoder",
    "SaeError",
    "SparseAutoencoder",
    "StackedAutoencoder",
    "StsaeAutoencoder",
    "TopKAutoencoder",
    "TrainedAutoencoder",
    "TrainedOptions",
    "build",
    "coherence",
    "export_sae",
    "forget_moments",
    "geometric_median",
    "has_weights",
    "import_sae",
    "shard",
    "unshard",
    "whole_on_host",
]
