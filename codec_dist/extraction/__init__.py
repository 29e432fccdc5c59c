"""Images to contribution store: a coordinator hands shards to Ray actors, which write their blocks themselves."""

from codec_dist.extraction.errors import ExtractionError
from codec_dist.extraction.extract import extract, mend_store
from codec_dist.extraction.plan import Plan, make_plan
from codec_dist.extraction.scheduling import FailedShard
from codec_dist.extraction.summary import ExtractionSummary

__all__ = ["ExtractionError", "ExtractionSummary", "FailedShard", "Plan", "extract", "make_plan", "mend_store"]
