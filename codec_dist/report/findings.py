"""A run's main numbers: the headline of the report, and a short table for a terminal."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from codec_dist.report.formatting import interval, number, percent
from codec_dist.report.laws import Law, try_laws
from codec_dist.report.run_data import ACTIVATION, CONTRIBUTION, RESULTS, Row, RunData, read_run

POSITIVE = f"{CONTRIBUTION}-positive"


@dataclass(frozen=True)
class Headline:
    """One number that a reader sees first."""

    value: str
    label: str
    remark: str = ""


@dataclass(frozen=True)
class Findings:
    """What a run found; ``str`` is a table for a terminal."""

    headlines: Sequence[Headline]
    laws: Sequence[Law]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    """One row per layer."""
    left_out: Sequence[str] = ()
    """Stages whose results belong to other settings or an earlier version and are left out."""

    def __str__(self) -> str:
        table = [list(self.columns), *map(list, self.rows)]
        widths = [max(len(row[column]) for row in table) for column in range(len(self.columns))]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        lines.insert(1, "─" * max(map(len, lines)))
        headlines = [f"{one.label}: {one.value}" + (f" ({one.remark})" if one.remark else "") for one in self.headlines]
        laws = [f"{law.verdict + ':':<15}{law.title}" for law in self.laws]
        remarks = (
            ["", f"left out, of other settings or an earlier version: {', '.join(self.left_out)}"]
            if self.left_out
            else []
        )
        return "\n".join([*headlines, "", *lines, "", *laws, *remarks])


def findings(run_directory: Path, current: Collection[str] | None = None) -> Findings:
    """The main numbers of a run, as far as its stages have gone.

    Args:
        run_directory: the run's folder.
        current: stages whose results belong together; those of others are left out. None: all that is there.

    Raises:
        ReportError: no such run, or a file that cannot be read.
    """
    return find(read_run(Path(run_directory), current=current))


def find(data: RunData) -> Findings:
    """The main numbers of a run that was read already."""
    counts = {"quantity": POSITIVE, "unit": "mode"}
    columns = {
        "Hoyer, contributions": data.by_layer(data.statistics, "hoyer_median", quantity=CONTRIBUTION),
        "activations": data.by_layer(data.statistics, "hoyer_median", quantity=ACTIVATION),
        "E/I": data.by_layer(data.statistics, "ei_median", quantity=CONTRIBUTION),
        "EV of SAE": explained_variance(data, POSITIVE),
        "alive modes": data.by_layer(data.layer_counts, "alive", **counts),
        "relative AUC": data.by_layer(data.areas, "relative_auc", ranking=POSITIVE, kind="ablate"),
    }
    rows = []
    for place, layer in enumerate(data.layers):
        null = data.null(layer, POSITIVE, "ablate") or {}
        chance = [interval(null.get("low"), null.get("high")), number(null.get("p"), 3)]
        rows.append([layer, *(number(values[place]) for values in columns.values()), *chance])
    left_out = [stage for stage in RESULTS if stage in data.left_out]
    return Findings(headlines(data), try_laws(data), ["layer", *columns, "random: 95 %", "p"], rows, left_out)


def explained_variance(data: RunData, quantity: str) -> list[float | None]:
    """EV on *evaluate* of each layer's selected SAE."""
    saes = [data.selected_sae(layer, quantity) for layer in data.layers]
    return [sae.evaluate.get("ev") if sae else None for sae in saes]


def headlines(data: RunData) -> list[Headline]:
    """The numbers that are known, most general first."""
    found: list[Headline] = []
    if data.store is not None:
        parts = ", ".join(f"{count:,} {name}" for name, count in data.store.parts.items())
        found.append(Headline(f"{data.store.images:,}", "images", parts))
        channels = sum(data.store.layers.values())
        found.append(Headline(str(len(data.store.layers)), "layers", f"{channels:,} channels"))
        if data.store.accuracy is not None:
            found.append(Headline(percent(data.store.accuracy), "model accuracy", "on the evaluate part"))
        if data.store.residuals:
            worst = max(data.store.residuals, key=lambda residual: residual.median)
            remark = f"median relative residual at the worst layer ({worst.layer})"
            found.append(Headline(percent(worst.median), "missing from the sum of contributions", remark))
    explained = sorted(value for value in explained_variance(data, POSITIVE) if value is not None)
    if explained:
        spread = f"{number(explained[0])} to {number(explained[-1])} over layers"
        found.append(Headline(number(_median(explained)), "median EV of contribution SAEs", spread))
    counts = [row for row in data.layer_counts if (row["quantity"], row["unit"]) == (POSITIVE, "mode")]
    if counts:
        alive, modes = sum(row["alive"] for row in counts), sum(row["modes"] for row in counts)
        speaking = sum(row["modes_above_threshold"] for row in counts)
        found.append(Headline(f"{alive:,}", "alive contribution modes", f"of {modes:,}; {speaking:,} speak of a class"))
    found += _best_ablation(data)
    return found


def _best_ablation(data: RunData) -> list[Headline]:
    """The lowest relative AUC, with its interval and with what random channels give at the same layer."""
    areas = [row for row in data.areas if (row["ranking"], row["kind"]) == (POSITIVE, "ablate")]
    known = [row for row in areas if row["relative_auc"] is not None]
    if not known:
        return []
    best: Row = min(known, key=lambda row: float(row["relative_auc"]))
    parts = [f"at {best['layer']}" + (f", lowest of {len(known)} layers" if len(known) > 1 else "")]
    if best["relative_auc_low"] is not None:
        parts.append(f"95 %: {interval(best['relative_auc_low'], best['relative_auc_high'])}")
    null = data.null(best["layer"], POSITIVE, "ablate")
    if null is not None:
        parts.append(f"random channels: {interval(null['low'], null['high'])}, p = {number(null['p'], 3)}")
    return [Headline(number(best["relative_auc"]), "best relative ablation AUC", "; ".join(parts))]


def _median(values: Sequence[float]) -> float:
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2
