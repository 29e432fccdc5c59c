"""Errors in what a mode summary is asked for."""

from codec_dist.utils import CodecError


class ModesError(CodecError):
    """Labels, classes, concepts or files from which modes cannot be summarized."""
