"""Which SAEs advance together, from where, and on which rank."""

from pathlib import Path
from typing import Any

from codec_dist.config import TrainingSettings
from codec_dist.training.co_training import Cohort, hand_out, make_bundles, make_cohorts
from codec_dist.training.sae_jobs import SaeJob
from codec_dist.training.saving import SavedCohort

ROOT = Path("sae")


def job(name: str, layer: str = "a", architecture: str = "topk", channels: int = 4, **settings: Any) -> SaeJob:
    asked = TrainingSettings(**{"epochs": 10, **settings})
    options = {"k": 1} if architecture == "topk" else {}
    return SaeJob(layer, "q", channels, architecture, options, asked, 0, f"{name:0<12}")


def names(cohorts: list[Cohort]) -> list[tuple[str, int]]:
    return [("".join(one.digest[0] for one in cohort.jobs), cohort.first_epoch) for cohort in cohorts]


def test_one_pass_serves_all_that_share_rows_and_batch_size() -> None:
    jobs = [
        job("1"), job("2", learning_rate=1, epochs=3), job("3", batch_size=7), job("4", layer="b"),
        job("5", architecture="pca"), job("6", precision="tf32"), job("7", architecture="relu"), job("8", divide=True),
    ]  # fmt: skip
    cohorts = make_cohorts(jobs, [False] * 8, [], ROOT)
    assert names(cohorts) == [("127", 0), ("3", 0), ("4", 0), ("5", 0), ("6", 0), ("8", 0)]
    assert [cohort.fitted for cohort in cohorts] == [False, False, False, True, False, False]
    assert len({cohort.state for cohort in cohorts}) == 6


def test_what_was_saved_together_goes_on_together_even_if_finished() -> None:
    jobs = [job(name) for name in "123456"]
    finished = [True, False, True, False, False, True]
    identities = [one.identity for one in jobs]
    unknown = "0" * 12 + "-s0"
    saved = [
        SavedCohort(ROOT / "x", 4, (identities[3], identities[0], unknown)),
        SavedCohort(ROOT / "y", 6, (identities[2], identities[5])),
    ]
    assert names(make_cohorts(jobs, finished, saved, ROOT)) == [("41", 4), ("25", 0)]


def test_layers_are_bundled_while_their_rows_fit() -> None:
    cohorts = make_cohorts([job(name, layer=name) for name in "1234"], [False] * 4, [], ROOT)
    sizes = {cohort.source: size for cohort, size in zip(cohorts, (40, 70, 200, 50), strict=True)}
    resident = {key: size <= 120 for key, size in sizes.items()}
    bundles = make_bundles(cohorts, sizes, resident, 120)
    found = [("".join(one.key[0] for one in bundle.cohorts), bundle.resident) for bundle in bundles]
    assert sorted(found) == [("12", True), ("3", False), ("4", True)]
    assert len(make_bundles(cohorts, sizes, dict.fromkeys(sizes, True), 1000, join=False)) == 4


def test_layers_are_bundled_while_their_weights_fit_beside_the_rows() -> None:
    jobs = [job(name, layer=name) for name in "123"]
    cohorts = make_cohorts(jobs, [False] * 3, [], ROOT)
    sizes = {cohort.source: 10 for cohort in cohorts}
    for times, expected in ((2.5, ["12", "3"]), (1.5, ["1", "2", "3"]), (0.5, ["1", "2", "3"])):
        budget = int(times * 4 * jobs[0].parameters / 0.6)
        bundles = make_bundles(cohorts, sizes, dict.fromkeys(sizes, True), budget, bytes_per_parameter=4)
        assert ["".join(one.key[0] for one in bundle.cohorts) for bundle in bundles] == expected


def test_ranks_get_whole_layers_the_largest_first() -> None:
    jobs = [job(name, layer=name, channels=width) for name, width in zip("1234", (3, 4, 5, 2), strict=True)]
    jobs.append(job("5", layer="1", channels=3, batch_size=9))
    shares = hand_out(make_cohorts(jobs, [False] * 5, [], ROOT), 2)
    assert ["".join(one.jobs[0].digest[0] for one in share) for share in shares] == ["34", "152"]
    assert hand_out([], 3) == [[], [], []]


def test_where_ranks_outnumber_layers_a_layer_is_divided() -> None:
    jobs = [job(name, layer="a") for name in "1234"] + [job("5", layer="b"), job("6", layer="b", batch_size=9)]
    shares = hand_out(make_cohorts(jobs, [False] * 6, [], ROOT), 5)
    found = [["".join(one.digest[0] for one in cohort.jobs) for cohort in share] for share in shares]
    assert sorted(found) == [["1"], ["2"], ["34"], ["5"], ["6"]]
    assert len({cohort.state for share in shares for cohort in share}) == 5


def test_what_was_saved_together_is_not_divided_among_ranks() -> None:
    jobs = [job(name) for name in "12"]
    saved = [SavedCohort(ROOT / "x", 4, tuple(one.identity for one in jobs))]
    shares = hand_out(make_cohorts(jobs, [False] * 2, saved, ROOT), 2)
    assert sorted(map(len, shares)) == [0, 1]
