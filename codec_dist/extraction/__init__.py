"""Images to contribution store: a coordinator hands shards to Ray actors, which write their blocks themselves."""

from codec_dist.extraction.coordinator import FailedShard
from codec_dist.extraction.errors import ExtractionError
from codec_dist.extraction.extract import ExtractionSummary, extract

__all__ = ["ExtractionError", "ExtractionSummary", "FailedShard", "extract"]
