"""Bad input is refused in the driver, in one clear line, before any actor starts."""

import dataclasses
import io
import shutil
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import ray

from codec_dist.attribution import AttributionError
from codec_dist.config import Config
from codec_dist.extraction import ExtractionError, extract
from codec_dist.extraction.plan import check_free_space, make_plan, open_store
from codec_dist.models import ModelError
from codec_dist.shards import ShardError, digits, pack
from codec_dist.store import ContributionStore, StoreError
from codec_dist.utils import CodecError

MakeConfig = Callable[..., Config]


@pytest.fixture(autouse=True)
def no_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks Ray for an actor or a session here has gone too far."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("Ray was asked for something")

    monkeypatch.setattr(ray, "remote", refuse)
    monkeypatch.setattr(ray, "init", refuse)


@pytest.mark.parametrize(
    ("kind", "sections", "message"),
    [
        (ShardError, {"data": {"shards": "/nowhere/shards"}}, "nowhere"),
        (ModelError, {"model": {"weights": "/nowhere/weights.safetensors"}}, "nowhere"),
        (ModelError, {"model": {"spec": "module:codec_dist.demo.classifier:digits_clasifier"}}, "has no function"),
        (ModelError, {"attribution": {"layers": ["blocks.9"]}}, r"blocks\.9"),
        (AttributionError, {"attribution": {"method": {"name": "integrated_gradient"}}}, "integrated_gradients"),
        (AttributionError, {"attribution": {"target": {"name": "top_k", "options": {"k": 11}}}}, "10 outputs"),
        (
            ExtractionError,
            {"data": {"image_fields": ["bmp"]}},
            r"none of the first 100 samples .* in digits-000000\.tar: .*expected one of bmp",
        ),
    ],
)
def test_bad_input_is_refused_before_any_actor(
    make_config: MakeConfig, kind: type[CodecError], sections: dict, message: str
) -> None:
    with pytest.raises(kind, match=message) as refusal:
        extract(make_config(**sections))
    assert "\n" not in str(refusal.value)


ODD = Path(__file__).parent / "odd_classifiers.py"


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("random", "allow_random", "random in evaluation mode.*attribution.allow_random"),
        ("mixing", "allow_mixing", "mixes the images of a batch.*attribution.allow_mixing"),
    ],
)
def test_odd_networks_are_refused_unless_allowed_which_makes_another_store(
    make_config: MakeConfig, name: str, option: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ODD.parent)
    odd = {"spec": f"module:{ODD.stem}:{name}"}
    with pytest.raises(AttributionError, match=message) as refusal:
        extract(make_config(model=odd, attribution={"layers": ["norm"]}))
    assert "\n" not in str(refusal.value)
    usual, _ = make_plan(make_config())
    plan, _ = make_plan(make_config(model=odd, attribution={"layers": ["norm"], option: True}))
    assert plan.identity["attribution"][option] is True
    assert usual.identity["attribution"][option] is False


def test_truncated_shard_is_refused_with_its_name(make_config: MakeConfig, packed: Path, tmp_path: Path) -> None:
    shards = shutil.copytree(packed, tmp_path / "shards")
    tar = shards / "digits-000003.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    with pytest.raises(ShardError, match=r"digits-000003\.tar"):
        extract(make_config(data={"shards": str(shards)}))


def test_store_of_another_config_is_refused_with_the_difference(make_config: MakeConfig) -> None:
    open_store(*make_plan(make_config()), {"device": "cpu"})
    method = {"name": "integrated_gradients", "options": {"steps": 20, "points": "uniform"}}
    with pytest.raises(StoreError, match=r"attribution\.method\.options\.steps: 2 in the store, 20 requested"):
        extract(make_config(attribution={"method": method}))
    with pytest.raises(StoreError, match="threads_per_actor: 1 in the store, 2 requested"):
        extract(make_config(cluster={"cpus_per_actor": 2}))


def test_places_and_numbers_of_actors_do_not_make_another_store(
    make_config: MakeConfig, packed: Path, tmp_path: Path
) -> None:
    method = {"name": "integrated_gradients", "options": {"steps": 2, "points": "uniform", "baseline": "zeros"}}
    first, shards = make_plan(make_config())
    assert open_store(first, shards, {"device": "cpu"}) == {"device": "cpu"}
    # A store keeps the kind of device that it was made with.
    assert open_store(first, shards, {"device": "cuda"}) == {"device": "cpu"}
    moved = shutil.copytree(packed, tmp_path / "moved")
    second, _ = make_plan(
        make_config(
            data={"shards": str(moved)},
            attribution={
                "layers": ["blocks.3", "blocks.5"],
                "microbatch": 8,
                # Spelling out a default is not a change.
                "method": method,
            },
            cluster={"actors": 2, "attempts": 1},
        )
    )
    assert first.store == second.store
    assert list(ContributionStore(first.store).layers) == ["blocks.3", "blocks.5"]


def test_target_that_needs_labels_names_the_sample_without(make_config: MakeConfig, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "some-000000.tar", "w") as tar:
        for name, content in {"a.png": b"x", "a.cls": b"1", "b.png": b"x"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(ExtractionError, match=r"needs a label from 0 to 9 .* b in some-000000\.tar has no label"):
        extract(make_config(data={"shards": str(shards)}, attribution={"target": {"name": "label"}}))


def _pack_with_labels_beyond(folder: Path, beyond: int) -> str:
    """Twenty digits, so many of them with the label 11."""
    samples, _ = digits()
    mixed = [
        dataclasses.replace(each, label=11) if number < beyond else each
        for number, each in enumerate(islice(samples, 20))
    ]
    pack(mixed, folder, samples_per_shard=20)
    return str(folder)


def test_too_many_labels_beyond_the_outputs_are_refused_whatever_the_target(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    data = {"shards": _pack_with_labels_beyond(tmp_path / "shards", 3), "max_bad_fraction": 0.1}
    message = (
        r"digit-00000\d in shard-000000\.tar has the label 11, .* 10 outputs .* from 0 to 9 \(3 of 20 samples are "
        r"beyond, more than data\.max_bad_fraction \(0\.1\) allows\)"
    )
    with pytest.raises(ExtractionError, match=message):
        extract(make_config(data=data))


def test_more_class_names_than_outputs_are_refused_before_ray_starts(make_config: MakeConfig, tmp_path: Path) -> None:
    samples, classes = digits()
    pack(islice(samples, 20), tmp_path / "shards", classes=[*classes, "ten"])
    with pytest.raises(ExtractionError, match=r"names 11 classes, but the model has 10 outputs"):
        make_plan(make_config(data={"shards": str(tmp_path / "shards")}))


def test_a_few_labels_beyond_the_outputs_do_not_hinder_the_plan(make_config: MakeConfig, tmp_path: Path) -> None:
    data = {"shards": _pack_with_labels_beyond(tmp_path / "shards", 2), "max_bad_fraction": 0.1}
    plan, _ = make_plan(make_config(data=data))
    assert list(plan.layers) == ["blocks.3", "blocks.5"]


def test_a_few_unlabelled_and_broken_samples_do_not_hinder_the_plan(make_config: MakeConfig, tmp_path: Path) -> None:
    samples, _ = digits()
    mixed = [
        dataclasses.replace(each, label=None) if number == 1 else dataclasses.replace(each, image=b"torn")
        if number == 0 else each
        for number, each in enumerate(islice(samples, 20))
    ]  # fmt: skip
    # In this order, whatever packing would make of it.
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "some-000000.tar", "w") as tar:
        for each in mixed:
            label = {} if each.label is None else {"cls": str(each.label).encode()}
            for extension, content in ({each.extension: each.image} | label).items():
                member = tarfile.TarInfo(f"{each.key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    data = {"shards": str(shards), "max_bad_fraction": 0.1}
    plan, _ = make_plan(make_config(data=data, attribution={"target": {"name": "label"}}))
    assert list(plan.layers) == ["blocks.3", "blocks.5"]


def test_disk_that_cannot_hold_the_store_is_refused(make_config: MakeConfig) -> None:
    plan, shards = make_plan(make_config())
    check_free_space(plan, shards)
    with pytest.raises(ExtractionError, match=r"needs about .* GB more, but .* GB are free"):
        check_free_space(plan, [dataclasses.replace(shards[0], samples=10**12)])


def test_object_store_is_not_asked_for_its_free_space(make_config: MakeConfig) -> None:
    plan, shards = make_plan(make_config())
    remote = dataclasses.replace(plan, store="s3://bucket/run/store")
    check_free_space(remote, [dataclasses.replace(shards[0], samples=10**12)])
