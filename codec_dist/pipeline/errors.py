"""What can go wrong between stages."""

from codec_dist.utils import CodecError


class PipelineError(CodecError):
    """A stage that cannot run: an earlier one is missing, or its files are not those of this config."""
