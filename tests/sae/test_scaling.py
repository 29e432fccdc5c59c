"""What rows are divided by, and that everything outside is in stored units."""

from pathlib import Path

import pytest
import torch

from codec_dist.sae import SparseAutoencoder, build


def rows_of(channels: int = 6, rows: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(rows, channels, generator=generator, dtype=torch.float64) * torch.logspace(-3, 2, channels)


def make(name: str = "topk", rows: torch.Tensor | None = None, **options: object) -> SparseAutoencoder:
    rows = rows_of() if rows is None else rows
    sae = build(name, {"modes": 9, "k": 3, **options} if name == "topk" else options, rows.shape[1], seed=1).double()
    sae.calibrate(rows, rows.std(correction=0).item())
    return sae


def test_one_scalar_is_the_deviation_over_everything() -> None:
    sae, rows = make(), rows_of()
    assert sae.scale == rows.std(correction=0).item()
    torch.testing.assert_close(sae.scaled(rows), rows / sae.scale)


def test_per_channel_scaling_gives_every_channel_unit_deviation() -> None:
    sae, rows = make(scaling="per_channel"), rows_of()
    deviations = sae.scaled(rows).std(0, correction=0)
    # A channel that varies by less than a thousandth of everything is not blown up to noise.
    least = 1e-3 * rows.std(correction=0)
    expected = torch.where(rows.std(0, correction=0) < least, rows.std(0, correction=0) / least, 1)
    torch.testing.assert_close(deviations, expected)
    assert (expected < 1).any()
    assert (expected == 1).any()


def test_deviations_may_be_given() -> None:
    rows = rows_of()
    sae = build("topk", {"modes": 9, "k": 3, "scaling": "per_channel"}, 6).double()
    sae.calibrate(rows[:5], 1e-9, deviations=rows.std(0, correction=0))
    torch.testing.assert_close(sae.scaled(rows).std(0, correction=0), torch.ones(6).double())


def test_no_scaling_takes_rows_as_they_are() -> None:
    sae, rows = make(scaling="none"), rows_of()
    torch.testing.assert_close(sae.scaled(rows), rows, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options", [{}, {"scaling": "per_channel"}, {"scaling": "none"}, {"nonnegative": True}], ids=str
)
def test_a_row_is_the_bias_plus_loadings_times_the_dictionary_times_the_scale(options: dict[str, object]) -> None:
    rows = -rows_of() if "nonnegative" in options else rows_of()
    sae = make(rows=rows, **options)
    loadings = sae.encode(rows)
    assert (loadings > 0).any()
    without = sae.decode(torch.zeros_like(loadings))
    torch.testing.assert_close(
        sae.decode(loadings).detach(), (without + loadings @ sae.dictionary * sae.scale).detach()
    )
    torch.testing.assert_close(sae(rows), sae.decode(loadings))


@pytest.mark.parametrize("options", [{"scaling": "per_channel"}, {"nonnegative": True}], ids=str)
def test_scaling_statistics_are_stored_in_the_checkpoint(tmp_path: Path, options: dict[str, object]) -> None:
    rows = -rows_of()
    sae = make(rows=rows, **options)
    sae.save(tmp_path)
    loaded = SparseAutoencoder.load(tmp_path)
    torch.testing.assert_close(loaded(rows), sae(rows), rtol=0, atol=0)
    torch.testing.assert_close(loaded.channel_scale, sae.channel_scale, rtol=0, atol=0)


def test_two_signs_side_by_side_are_a_layer_of_half_as_many_channels(tmp_path: Path) -> None:
    rows = torch.cat([rows_of(), -rows_of()], dim=1)
    sae = make(rows=rows, nonnegative=True)
    sae.sign = "both"
    assert (sae.scaled(rows) >= 0).all(), "the negative half is flipped"
    assert (sae.dictionary[:, :6] >= 0).all()
    assert (sae.dictionary[:, 6:] <= 0).all()
    sae.save(tmp_path)
    loaded = SparseAutoencoder.load(tmp_path)
    assert (loaded.sign, loaded.channels, loaded.layer_channels) == ("both", 12, 6)
    assert make().layer_channels == 6


@pytest.mark.parametrize(
    ("start", "expected"),
    [("mean", "mean"), ("zero", "zeros"), ("geometric_median", "geometric median"), ("none", None)],
)
def test_the_decoder_bias_starts_where_asked(start: str, expected: str | None) -> None:
    rows = rows_of()
    sae = make(decoder_bias=start)
    scaled = rows / sae.scale
    if expected is None:
        assert sae.decoder_bias is None
        return
    found = sae.decoder_bias.detach()
    if start == "geometric_median":
        sums = [torch.linalg.vector_norm(scaled - point, dim=1).sum() for point in (found, scaled.mean(0))]
        assert sums[0] < sums[1]
    else:
        torch.testing.assert_close(found, scaled.mean(0) if start == "mean" else torch.zeros(6).double())
