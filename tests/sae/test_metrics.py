"""Streaming metrics against two-pass float64 ones."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codec_dist.sae import ReconstructionMetrics, SaeError, build, coherence


def two_pass(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> dict[str, float]:
    """The definitions, in extended precision where the machine has it."""
    wide = x.astype(np.longdouble)
    error = ((wide - y) ** 2).sum()
    norms, other = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    on = norms > 0
    inner = (x * y).sum(1)
    hoyer = [(math.sqrt(len(v)) - np.abs(v).sum() / np.linalg.norm(v)) / (math.sqrt(len(v)) - 1) for v in z if v.any()]
    return {
        "samples": len(x),
        "ev": float(1 - error / ((wide - wide.mean(0)) ** 2).sum()),
        "fvu": float(error / ((wide - wide.mean(0)) ** 2).sum()),
        "r2_global": float(1 - error / ((wide - wide.mean()) ** 2).sum()),
        "mse": float(error / x.size),
        "l0": (z != 0).sum() / len(z),
        "dead_fraction": (~(z != 0).any(0)).mean(),
        "cosine": np.mean(np.where(other > 0, inner / (norms * np.where(other > 0, other, 1) + (norms == 0)), 0)[on]),
        "shrinkage": np.mean((other / (norms + (norms == 0)))[on]),
        "hoyer_loadings": np.mean(hoyer) if hoyer else math.nan,
    }


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(2, 60),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    offset=st.sampled_from([0.0, 1.0, 1e4]),
    split=st.integers(0, 6),
)
def test_streaming_equals_two_passes_for_any_chunking(
    seed: int, rows: int, cuts: list[int], offset: float, split: int
) -> None:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, 4)) + offset * generator.random(4)
    y = x + 0.3 * generator.normal(size=x.shape)
    z = generator.random((rows, 5)) * (generator.random((rows, 5)) < 0.3)
    if rows > 3:
        x[1], y[2] = 0, 0
    edges = [0, *sorted(min(cut, rows) for cut in cuts), rows]
    chunks = [slice(a, b) for a, b in itertools.pairwise(edges)]
    left, right = ReconstructionMetrics(), ReconstructionMetrics()
    for number, chunk in enumerate(chunks):
        part = left if number < split else right
        part.update(*(torch.from_numpy(values[chunk]) for values in (x, y, z)))
    report = left.merge(right).result()
    for name, value in two_pass(x, y, z).items():
        # The error of EV is relative to its terms; with a large offset float64 inputs themselves round.
        assert getattr(report, name) == pytest.approx(value, rel=1e-9, abs=1e-9, nan_ok=True), name
    np.testing.assert_allclose(report.frequency, (z != 0).mean(0))


def test_explained_variance_survives_large_means() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(1000, 3)) + 1e7
    y = x + 0.1 * generator.normal(size=x.shape)
    metrics = ReconstructionMetrics()
    for chunk in np.split(np.arange(1000), 10):
        metrics.update(torch.from_numpy(x[chunk]), torch.from_numpy(y[chunk]), torch.ones(100, 2, dtype=torch.float64))
    assert metrics.result().ev == pytest.approx(two_pass(x, y, np.ones((1000, 2)))["ev"], abs=1e-9)


def test_dictionary_metrics_equal_the_definitions() -> None:
    dictionary = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, -0.1, 0, 0]])
    metrics = ReconstructionMetrics()
    metrics.update(torch.ones(2, 4), torch.ones(2, 4), torch.ones(2, 4))
    report = metrics.result(dictionary)
    norm = math.sqrt(1.01)
    assert report.coherence == coherence(dictionary) == pytest.approx(1 / norm)
    assert report.hoyer_dictionary == pytest.approx((1 + 0 + (2 - 1.1 / norm)) / 3)


def test_density_histogram_counts_alive_modes() -> None:
    metrics = ReconstructionMetrics()
    loadings = torch.zeros(100, 4)
    loadings[:, 0], loadings[:10, 1], loadings[:1, 2] = 1, 1, 1
    metrics.update(torch.rand(100, 3), torch.rand(100, 3), loadings)
    histogram = metrics.result().density_histogram
    assert len(histogram) == 28
    assert histogram.sum() == 3
    assert histogram[-1] == 1


def test_density_histogram_and_dead_fraction_equal_numpys_over_the_window() -> None:
    generator = np.random.default_rng(1)
    frequencies = 10 ** generator.uniform(-4, 0, size=60)
    fired = generator.random((5000, 60)) < frequencies
    metrics = ReconstructionMetrics()
    for chunk in np.split(np.arange(5000), 7 * [0] + [1000, 4321]):
        rows = torch.ones(len(chunk), 3)
        metrics.update(rows, rows, torch.from_numpy(fired[chunk] * 0.5))
    report = metrics.result()
    density = fired.mean(0)
    expected, _ = np.histogram(np.log10(density[density > 0]), np.arange(-7, 0.01, 0.25))
    np.testing.assert_array_equal(report.density_histogram, expected)
    assert report.samples == 5000, "the window over which a mode that did not fire counts as dead"
    assert report.dead_fraction == pytest.approx((density == 0).mean())
    assert report.dead_fraction > 0


def test_an_sae_reports_its_metrics_in_eval_mode_and_stored_units() -> None:
    sae = build("stsae", {"hidden": 8, "threshold": 0.5, "dropout": 0.5}, channels=4).train()
    rows = 5 * torch.rand(30, 4)
    sae.calibrate(rows, 2.0)
    report = sae.metrics(rows.split(7))
    assert sae.training
    sae.eval()
    x, y, z = (values.detach().double().numpy() for values in (rows, sae(rows), sae.encode(rows)))
    for name, value in two_pass(x, y, z).items():
        assert getattr(report, name) == pytest.approx(value, rel=1e-6, abs=1e-6), name
    assert report.coherence == pytest.approx(coherence(sae.dictionary))


def test_undefined_metrics_are_nan_and_null_in_json() -> None:
    metrics = ReconstructionMetrics()
    metrics.update(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 4))
    report = metrics.result()
    assert all(math.isnan(value) for value in (report.ev, report.r2_global, report.cosine, report.hoyer_loadings))
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["ev"] is None
    assert report.dead_fraction == 1


def test_no_rows_and_other_widths_are_refused() -> None:
    metrics = ReconstructionMetrics()
    metrics.update(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0, 4))
    with pytest.raises(SaeError, match="no rows"):
        metrics.result()
    metrics.update(torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 4))
    with pytest.raises(SaeError, match="3 channels"):
        metrics.update(torch.ones(3, 3), torch.ones(3, 3), torch.ones(3, 4))
