"""Baselines are what their names say, and statistics of a data set are those of all its samples."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from codec_dist.attribution import (
    BASELINES,
    AttributionError,
    Attributor,
    Blur,
    Constant,
    DataStatistics,
    GivenImage,
    IntegratedGradients,
    Surprisal,
)

IMAGES = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))


def test_the_config_reaches_every_baseline_by_name(tmp_path: Path) -> None:
    assert set(BASELINES) == {"zeros", "constant", "image", "blur", "mean"}
    save_file({"x": IMAGES[0]}, tmp_path / "x.safetensors")
    for given_as, expected in {
        "zeros": torch.zeros(1, 3, 6, 5),
        "constant": torch.full((1, 3, 6, 5), 0.5),
        "image": IMAGES[:1],
    }.items():
        options = {"constant": {"value": 0.5}, "image": {"file": str(tmp_path / "x.safetensors")}}.get(given_as, {})
        method = IntegratedGradients(baseline={"name": given_as, "options": options}, points="uniform")
        assert torch.equal(method.baseline.start(IMAGES), expected)


def test_a_blur_keeps_what_is_flat_and_the_mean_colour_of_what_is_symmetric() -> None:
    flat = torch.full((1, 2, 7, 9), 3.0, dtype=torch.float64)
    torch.testing.assert_close(Blur(2.0).start(flat), flat)
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 1, 64, 64, dtype=torch.float64, generator=generator)
    narrow, wide = Blur(1.0).start(image), Blur(8.0).start(image)
    assert wide.std() < 0.2 * narrow.std() < 0.2 * image.std()


def test_a_blur_wider_than_the_image_is_still_a_mean() -> None:
    blurred = Blur(50.0).start(IMAGES.double())
    low, high = IMAGES.amin((2, 3), keepdim=True).double(), IMAGES.amax((2, 3), keepdim=True).double()
    assert ((blurred >= low) & (blurred <= high)).all()


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda: IntegratedGradients(baseline="zero", points="uniform"), "unknown baseline 'zero': did you mean zeros"),
        (
            lambda: IntegratedGradients(baseline={"name": "blur", "options": {"width": 3}}, points="uniform"),
            "no option 'width'",
        ),
        (lambda: IntegratedGradients(baseline={"kind": "blur"}, points="uniform"), "bad baseline"),
        (lambda: Constant("grey"), "give a number"),  # type: ignore[arg-type]
        (lambda: Blur(0), "must be above 0"),
        (lambda: GivenImage(), "either values"),
        (lambda: GivenImage(file="/nowhere.safetensors"), "cannot read"),
        (lambda: Constant([1.0, 2.0]).start(IMAGES), "2 values for images of 3 channels"),
        (lambda: GivenImage(torch.zeros(3, 4, 4)).start(IMAGES), "the baseline is .3, 4, 4., the images are .3, 6, 5."),
        (lambda: BASELINES.build("mean").start(IMAGES), "no data set was given"),
    ],
)
def test_bad_baselines_are_refused(make, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users run without type checks
    with pytest.raises(AttributionError, match=cause):
        make()


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 100))
def test_statistics_of_parts_merge_to_those_of_the_whole(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(sum(sizes), 1, 2, 2, generator=generator)
    outputs = 3 + torch.randn(sum(sizes), 4, generator=generator)
    parts = [DataStatistics.of(*pair) for pair in zip(images.split(sizes), outputs.split(sizes))]
    merged = parts[0]
    for part in parts[1:]:
        merged.merge(part)
    assert merged.samples == sum(sizes)
    np.testing.assert_allclose(merged.mean_image, images.double().mean(0), atol=1e-12)
    np.testing.assert_allclose(merged.output_mean, outputs.double().mean(0), atol=1e-12)
    expected = np.cov(outputs.double().numpy(), rowvar=False, bias=True)
    np.testing.assert_allclose(merged.output_covariance, expected, atol=1e-12)


def test_statistics_of_a_model_fit_targets_and_baselines_and_survive_a_file(
    cnn: tuple[nn.Module, Tensor], tmp_path: Path
) -> None:
    model, _ = cnn
    images = torch.randn(12, 3, 16, 16)
    statistics = DataStatistics.measure(model, images.split(5))
    assert model.training
    outputs = model.eval()(images).detach().double()
    torch.testing.assert_close(statistics.output_mean, outputs.mean(0), rtol=1e-5, atol=1e-6)
    statistics.save(tmp_path / "statistics.safetensors")
    loaded = DataStatistics.load(tmp_path / "statistics.safetensors")
    assert loaded.samples == 12
    assert torch.equal(loaded.scatter, statistics.scatter)
    method = IntegratedGradients(20, baseline="mean", points="uniform").fitted(loaded)
    result = Attributor(model.double(), ["blocks.1"], method, Surprisal().fitted(loaded))(images.double())
    # (n/2) times the number of outputs' directions that vary, by the definition of a covariance.
    assert float(result.target_value.mean()) == pytest.approx(6 / 2, rel=0.01)
    torch.testing.assert_close(
        result["blocks.1"].net.sum(1), result.target_value - result.baseline_value + result["blocks.1"].completeness
    )


def test_statistics_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AttributionError, match="does not hold the statistics"):
        DataStatistics.load(tmp_path / "none.safetensors")
    with pytest.raises(AttributionError, match="at least one image"):
        DataStatistics.measure(nn.Identity(), [])
    with pytest.raises(AttributionError, match="do not vary"):
        Surprisal(torch.zeros(3), torch.zeros(3, 3))
    with pytest.raises(AttributionError, match="give both"):
        Surprisal(torch.zeros(3))
    with pytest.raises(AttributionError, match="no data set was given"):
        Surprisal().choose(torch.zeros(2, 3), None)
    with pytest.raises(AttributionError, match="moments of 3 outputs, the model has 4"):
        Surprisal(torch.zeros(3), torch.eye(3)).choose(torch.zeros(2, 4), None)
