"""What modes say about classes: correlations, specificity, coverage, best images (docs/method.md §5).

A notebook opens a run's summary with :class:`ModeSummary`; a pipeline folds :func:`summarize_shards` and
:func:`measure_shards` over groups of shards and writes the result with :class:`SummaryWriter` and
:func:`write_statistics`.
"""

from codec_dist.modes.errors import ModesError
from codec_dist.modes.layer_modes import (
    Coverage,
    LayerModes,
    Specificity,
    TopClass,
    TopMode,
    coverage,
    load_concepts,
    parse_concepts,
    specificity,
)
from codec_dist.modes.layer_summary import (
    PARTS,
    Correlations,
    LayerSummary,
    LoadingCorrelations,
    TopImages,
    TopLoadings,
)
from codec_dist.modes.map_reduce import (
    FoldInputs,
    SummaryTask,
    assign_parts,
    finish_summary,
    measure_shards,
    statistics_kinds,
    summarize_shards,
    summary_tasks,
)
from codec_dist.modes.stability import (
    STABILITY_FILE,
    DictionaryMatch,
    match_dictionaries,
    read_stability,
    stability_over_seeds,
    write_stability,
)
from codec_dist.modes.summary_files import ModeSummary, SummaryWriter, write_statistics

__all__ = [
    "PARTS",
    "STABILITY_FILE",
    "Correlations",
    "Coverage",
    "DictionaryMatch",
    "FoldInputs",
    "LayerModes",
    "LayerSummary",
    "LoadingCorrelations",
    "ModeSummary",
    "ModesError",
    "Specificity",
    "SummaryTask",
    "SummaryWriter",
    "TopClass",
    "TopImages",
    "TopLoadings",
    "TopMode",
    "assign_parts",
    "coverage",
    "finish_summary",
    "load_concepts",
    "match_dictionaries",
    "measure_shards",
    "parse_concepts",
    "read_stability",
    "specificity",
    "stability_over_seeds",
    "statistics_kinds",
    "summarize_shards",
    "summary_tasks",
    "write_stability",
    "write_statistics",
]
