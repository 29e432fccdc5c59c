"""Laws are said to hold, to hold in part or not to hold, by what was measured."""

from pathlib import Path
from typing import Any

import pytest

from codec_dist.report.findings import (
    FAILS,
    HOLDS,
    PARTLY,
    UNKNOWN,
    PaperFinding,
    check_paper_findings,
    rank_correlation,
)
from codec_dist.report.run_data import RunData

Series = list[float | None]


def run_data(
    hoyer: tuple[Series, Series] = ([], []),
    components: tuple[Series, Series] = ([], []),
    ei: Series | None = None,
    top: tuple[Series, Series] = ([], []),
    auc: tuple[Series, Series] = ([], []),
    chance: tuple[Series, Series] = ([], []),
    draws: int = 20,
) -> RunData:
    """``chance``: lower ends of the null's interval, of contribution and of activation modes."""
    depth = max(map(len, [*hoyer, *components, ei or [], *top, *auc]))
    names = [f"blocks.{place}" for place in range(depth)]

    def at(series: Series, place: int) -> float | None:
        return series[place] if place < len(series) else None

    statistics = [
        {
            "layer": layer, "quantity": kind, "hoyer_median": at(hoyer[number], place),
            "components_95": at(components[number], place), "ei_median": at(ei or [], place),
        }
        for place, layer in enumerate(names) for number, kind in enumerate(("contribution", "activation"))
    ]  # fmt: skip
    counts = [
        {"layer": layer, "quantity": f"{kind}-positive", "unit": "mode", "median_top_correlation": at(series, place)}
        for place, layer in enumerate(names)
        for kind, series in zip(("contribution", "activation"), top, strict=True)
    ]
    areas = [
        {
            "layer": layer, "ranking": ranking, "kind": "ablate", "relative_auc": (value := at(series, place)),
            "relative_auc_low": None if value is None else value - 0.06,
            "relative_auc_high": None if value is None else value + 0.06,
        }
        for place, layer in enumerate(names)
        for ranking, series in zip(("contribution-positive", "activation-positive"), auc, strict=True)
    ]  # fmt: skip
    nulls = [
        {
            "layer": layer, "ranking": ranking, "kind": "ablate", "statistic": "relative_auc", "draws": draws,
            "low": low, "high": 0.2,
        }
        for place, layer in enumerate(names)
        for ranking, series in zip(("contribution-positive", "activation-positive"), chance, strict=True)
        if (low := at(series, place)) is not None
    ]  # fmt: skip
    empty: dict[str, Any] = dict.fromkeys(("saes", "classes", "modes", "maps", "curves", "stages", "class_names"), ())
    return RunData(
        directory=Path(), store=None, statistics=statistics, layer_counts=counts, areas=areas, nulls=nulls, **empty
    )  # fmt: skip


def paper_findings(**measured: Any) -> list[PaperFinding]:
    return check_paper_findings(run_data(**measured))


def test_a_law_about_every_layer_holds_only_if_every_layer_obeys() -> None:
    assert paper_findings(hoyer=([0.4, 0.5], [0.3, 0.4]))[0].verdict == HOLDS
    partly = paper_findings(hoyer=([0.4, 0.4], [0.3, 0.4]))[0]  # equal is not sparser
    assert (partly.verdict, [obeys for _, obeys, _ in partly.layers]) == (PARTLY, [True, False])
    assert "1 of 2 layers" in partly.sentence
    assert paper_findings(hoyer=([0.2, 0.2], [0.3, 0.4]))[0].verdict == FAILS
    assert paper_findings()[0].verdict == UNKNOWN


def test_layers_that_were_not_measured_do_not_count() -> None:
    finding = paper_findings(hoyer=([0.4, None, 0.4], [0.3, 0.3, None]))[0]
    assert finding.verdict == HOLDS
    assert [obeys for _, obeys, _ in finding.layers] == [True, None, None]


def test_dimensionality_is_compared_layer_by_layer() -> None:
    assert paper_findings(components=([9, 9], [3, 4]))[1].verdict == HOLDS
    assert paper_findings(components=([9, 4], [3, 4]))[1].verdict == PARTLY


@pytest.mark.parametrize(
    ("hoyer", "components", "verdict"),
    [
        ([0.1, 0.2, 0.3], [1, 2, 3], HOLDS),
        ([0.1, 0.2, 0.3], [3, 2, 1], PARTLY),
        ([0.3, 0.2, 0.1], [3, 2, 1], FAILS),
        ([0.1, 0.2], [1, 2], UNKNOWN),
        ([0.1, 0.2, 0.3], [9, 9, 9], HOLDS),  # dimensionality that is the same everywhere has no trend to judge
    ],
)
def test_growth_with_depth_is_a_matter_of_rank(hoyer: Series, components: Series, verdict: str) -> None:
    assert paper_findings(hoyer=(hoyer, []), components=(components, []))[2].verdict == verdict


@pytest.mark.parametrize(
    ("ei", "verdict"),
    [
        ([0.98, 0.5, 0.02], HOLDS),
        ([0.6, 0.3, 0.1], PARTLY),
        ([0.9, 0.7, 0.5], PARTLY),
        ([0.03, -0.1, -0.25], FAILS),  # small throughout, as the paper reports for digits
        ([0.0, 0.5, 0.9], FAILS),
        ([0.9, 0.0], UNKNOWN),
    ],
)
def test_ei_correlation_must_fall_from_near_one_to_near_zero(ei: Series, verdict: str) -> None:
    assert paper_findings(ei=ei)[3].verdict == verdict


def test_the_papers_own_series_obey() -> None:
    import json

    from codec_dist.report import reference

    published = json.loads((Path(reference.__file__).parent / "reference_figures.json").read_text())["figures"]

    def medians(figure: str, name: str) -> Series:
        values = published[figure]["series"][name]
        return [value[0] if isinstance(value, list) else value for value in values]

    verdicts = [
        finding.verdict
        for finding in paper_findings(
            hoyer=(medians("3B", "contributions"), medians("3B", "activations")),
            components=(medians("3F", "contributions"), medians("3F", "activations")),
            ei=medians("3D", "contributions"),
            top=(medians("5D", "contribution_mode"), medians("5D", "activation_mode")),
        )
    ]
    assert verdicts == [HOLDS] * 5 + [UNKNOWN]
    uncertain = {figure for figure, content in published.items() if content["attribution"] == "uncertain"}
    assert uncertain == {"3D", "5D", "6E"}


def test_selectivity_is_better_the_lower_and_must_be_beyond_chance() -> None:
    finding = paper_findings(
        auc=([-0.4, -0.1, -0.2], [-0.2, -0.3, -0.1]),
        chance=([-0.15, -0.15, -0.25], [-0.15, -0.15, -0.25]),
    )[5]
    # At the second layer activation modes are more selective; at the third random channels reach as far.
    assert [obeys for _, obeys, _ in finding.layers] == [True, False, False]
    assert finding.verdict == PARTLY
    assert finding.stage == "intervene"
    assert "by contribution modes at 1 of 3 layers and by activation modes at 2 of 3 layers" in finding.sentence
    assert "−0.25 to 0.20" in finding.layers[2][2]
    # Intervals reach .06 to both sides: those of the first layer do not overlap, those of the third do.
    assert "are apart, in this direction, at 1 of 3 layers" in finding.sentence
    both_by_chance = paper_findings(auc=([-0.4, -0.4], [-0.2, -0.2]), chance=([-0.5, -0.5], [-0.5, -0.5]))[5]
    assert both_by_chance.verdict == FAILS
    assert paper_findings(auc=([-0.4], [-0.2]), chance=([-0.3], [-0.3]))[5].verdict == HOLDS


def test_without_enough_random_draws_selectivity_is_not_judged() -> None:
    for finding in (
        paper_findings(auc=([-0.9], [-0.2]))[5],
        paper_findings(auc=([-0.9], [-0.2]), chance=([-0.1], [-0.1]), draws=18)[5],
    ):
        assert finding.verdict == UNKNOWN
        assert "19 random draws" in finding.sentence
    assert paper_findings(auc=([-0.9], [-0.2]), chance=([-0.1], [-0.1]), draws=19)[5].verdict == HOLDS


def test_numbers_carry_a_true_minus_sign() -> None:
    assert "−0.10 against −0.30" in paper_findings(auc=([-0.1], [-0.3]), chance=([0.0], [0.0]))[5].sentence


def test_rank_correlation_is_spearmans() -> None:
    assert rank_correlation([1, 3, 2, 4]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert rank_correlation([1, None, 2]) is None
    assert rank_correlation([5, 5, 5]) is None
