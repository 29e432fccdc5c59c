"""Which SAEs advance together, from where, and on which rank."""

from pathlib import Path
from typing import Any

from codec_dist.config import TrainingSettings
from codec_dist.training.co_training import Sweep, hand_out, make_groups, make_sweeps
from codec_dist.training.sae_jobs import SaeJob
from codec_dist.training.saving import SavedSweep

ROOT = Path("sae")


def job(name: str, layer: str = "a", architecture: str = "topk", channels: int = 4, **settings: Any) -> SaeJob:
    asked = TrainingSettings(**{"epochs": 10, **settings})
    options = {"k": 1} if architecture == "topk" else {}
    return SaeJob(layer, "q", channels, architecture, options, asked, 0, f"{name:0<12}")


def names(sweeps: list[Sweep]) -> list[tuple[str, int]]:
    return [("".join(one.digest[0] for one in sweep.jobs), sweep.first_epoch) for sweep in sweeps]


def test_one_pass_serves_all_that_share_rows_and_batch_size() -> None:
    jobs = [
        job("1"), job("2", learning_rate=1, epochs=3), job("3", batch_size=7), job("4", layer="b"),
        job("5", architecture="pca"), job("6", precision="tf32"), job("7", architecture="relu"), job("8", divide=True),
    ]  # fmt: skip
    sweeps = make_sweeps(jobs, [False] * 8, [], ROOT)
    assert names(sweeps) == [("127", 0), ("3", 0), ("4", 0), ("5", 0), ("6", 0), ("8", 0)]
    assert [sweep.fitted for sweep in sweeps] == [False, False, False, True, False, False]
    assert len({sweep.state for sweep in sweeps}) == 6


def test_what_was_saved_together_goes_on_together_even_if_finished() -> None:
    jobs = [job(name) for name in "123456"]
    finished = [True, False, True, False, False, True]
    identities = [one.identity for one in jobs]
    unknown = "0" * 12 + "-s0"
    saved = [
        SavedSweep(ROOT / "x", 4, (identities[3], identities[0], unknown)),
        SavedSweep(ROOT / "y", 6, (identities[2], identities[5])),
    ]
    assert names(make_sweeps(jobs, finished, saved, ROOT)) == [("41", 4), ("25", 0)]


def test_layers_are_bundled_while_their_rows_fit() -> None:
    sweeps = make_sweeps([job(name, layer=name) for name in "1234"], [False] * 4, [], ROOT)
    sizes = {sweep.source: size for sweep, size in zip(sweeps, (40, 70, 200, 50), strict=True)}
    resident = {key: size <= 120 for key, size in sizes.items()}
    groups = make_groups(sweeps, sizes, resident, 120)
    found = [("".join(one.key[0] for one in group.sweeps), group.resident) for group in groups]
    assert sorted(found) == [("12", True), ("3", False), ("4", True)]
    assert len(make_groups(sweeps, sizes, dict.fromkeys(sizes, True), 1000, join=False)) == 4


def test_layers_are_bundled_while_their_weights_fit_beside_the_rows() -> None:
    jobs = [job(name, layer=name) for name in "123"]
    sweeps = make_sweeps(jobs, [False] * 3, [], ROOT)
    sizes = {sweep.source: 10 for sweep in sweeps}
    for times, expected in ((2.5, ["12", "3"]), (1.5, ["1", "2", "3"]), (0.5, ["1", "2", "3"])):
        budget = int(times * 4 * jobs[0].parameters / 0.6)
        groups = make_groups(sweeps, sizes, dict.fromkeys(sizes, True), budget, bytes_per_parameter=4)
        assert ["".join(one.key[0] for one in group.sweeps) for group in groups] == expected


def test_ranks_get_whole_layers_the_largest_first() -> None:
    jobs = [job(name, layer=name, channels=width) for name, width in zip("1234", (3, 4, 5, 2), strict=True)]
    jobs.append(job("5", layer="1", channels=3, batch_size=9))
    shares = hand_out(make_sweeps(jobs, [False] * 5, [], ROOT), 2)
    assert ["".join(one.jobs[0].digest[0] for one in share) for share in shares] == ["34", "152"]
    assert hand_out([], 3) == [[], [], []]


def test_where_ranks_outnumber_layers_a_layer_is_divided() -> None:
    jobs = [job(name, layer="a") for name in "1234"] + [job("5", layer="b"), job("6", layer="b", batch_size=9)]
    shares = hand_out(make_sweeps(jobs, [False] * 6, [], ROOT), 5)
    found = [["".join(one.digest[0] for one in sweep.jobs) for sweep in share] for share in shares]
    assert sorted(found) == [["1"], ["2"], ["34"], ["5"], ["6"]]
    assert len({sweep.state for share in shares for sweep in share}) == 5


def test_what_was_saved_together_is_not_divided_among_ranks() -> None:
    jobs = [job(name) for name in "12"]
    saved = [SavedSweep(ROOT / "x", 4, tuple(one.identity for one in jobs))]
    shares = hand_out(make_sweeps(jobs, [False] * 2, saved, ROOT), 2)
    assert sorted(map(len, shares)) == [0, 1]
