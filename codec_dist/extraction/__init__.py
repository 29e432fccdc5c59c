"""Images to contribution store: a coordinator hands shards to Ray actors, which write their blocks themselves."""

from codec_dist.extraction.account import ExtractionSummary
from codec_dist.extraction.errors import ExtractionError
from codec_dist.extraction.extract import extract
from codec_dist.extraction.mending import mend_store
from codec_dist.extraction.plan import Plan, make_plan
from codec_dist.extraction.scheduling import FailedShard

__all__ = ["ExtractionError", "ExtractionSummary", "FailedShard", "Plan", "extract", "make_plan", "mend_store"]
