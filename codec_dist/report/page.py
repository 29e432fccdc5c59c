"""The page: everything that was read, put into the template, written as one file."""

import base64
import hashlib
import importlib.metadata
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from codec_dist.config import Config, write_yaml
from codec_dist.report.causal import layer_curves, selectivity_figures
from codec_dist.report.depth import (
    completeness_advice,
    mode_figures,
    residual_figure,
    statistics_figures,
)
from codec_dist.report.findings import find
from codec_dist.report.formatting import duration, number, percent, size
from codec_dist.report.gallery import galleries
from codec_dist.report.reference import reference
from codec_dist.report.run_data import RESULTS, read_run
from codec_dist.report.saes import configurations, criterion, reasons, sae_table, training_charts
from codec_dist.report.tradeoff import trade_offs
from codec_dist.utils import without_credentials, write_bytes_atomically

SHOWN_DROPPED = 50


def build_report(
    run_directory: Path, config: Config, current: Collection[str] | None = None, notes: Sequence[str] = ()
) -> Path:
    """Write RUN/report/index.html: one file that needs no network, and loads nothing.

    Stages that have not run are left out, with the command that runs them. So are results of other settings.

    Args:
        run_directory: the run's folder.
        config: its config, shown as it is; names the run and says how many modes are shown per layer.
        current: stages (``prepare``, ``extract``, ``train``, ``summarize``, ``intervene``, ``visualize``) whose
            results belong to this config; what others have left is treated as not made yet. None: all that is there.
        notes: sentences for the top of the page, such as what could not be looked at.

    Returns:
        The path of the page.

    Raises:
        ReportError: no such run, or a file of the run that cannot be read.
        StoreError: a store that cannot be read.
        SaeError: an SAE that cannot be read.
    """
    run_directory = Path(run_directory)
    data = read_run(run_directory, config.data.shards, current, config.store_location)
    trained = configurations(data)
    context = {
        "title": config.report.title or config.run.name,
        "config": config,
        "data": data,
        "found": find(data),
        "statistics": statistics_figures(data),
        "saes": sae_table(data, trained),
        "criterion": criterion(data),
        "reasons": reasons(data, trained),
        "tradeoffs": trade_offs(data, trained),
        "training": training_charts(data),
        "mode_figures": mode_figures(data),
        "galleries": galleries(data, config.report.modes, config.modes.unstable_below),
        "selectivity": selectivity_figures(data),
        "curves": layer_curves(data),
        "completeness": residual_figure(data),
        "advice": completeness_advice(data),
        "reference": reference(),
        "settings": write_yaml(config.model_dump(mode="json")),
        "identity": list(_flat(data.store.identity)) if data.store else [],
        "stages": data.stages,
        "notes": list(notes),
        "left_out": [stage for stage in RESULTS if stage in data.left_out],
        "shown_dropped": SHOWN_DROPPED,
        "config_path": shlex.quote(str(run_directory / "config.yaml")),
        "run_path": shlex.quote(str(run_directory)),
        "built": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": importlib.metadata.version("codec_dist"),
    }
    path = run_directory / "report" / "index.html"
    write_bytes_atomically(path, without_credentials(render(context)).encode())
    return path


def render(context: Mapping[str, Any]) -> str:
    """The page as text. Everything from the run is escaped, and the page forbids itself to load anything."""
    style, script = _asset("style.css"), _asset("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Only this script, by its hash; only pictures that are in the page.
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    inline = {"style": Markup(style), "script": Markup(script), "policy": policy}
    return _environment().get_template("index.html").render(**context, **inline)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("codec_dist.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "size": size, "duration": duration}
    return environment


def _asset(name: str) -> str:
    return (files("codec_dist.report") / "templates" / name).read_text(encoding="utf-8")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as dotted names and text."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            yield f"{prefix}{name}", shown
