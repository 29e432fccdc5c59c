"""The HTML report of a run: one self-contained page, built from whatever stages have written so far."""

from codec_dist.report.errors import ReportError
from codec_dist.report.findings import Findings, Headline, PaperFinding, findings
from codec_dist.report.page import build_report

__all__ = ["Findings", "Headline", "PaperFinding", "ReportError", "build_report", "findings"]
