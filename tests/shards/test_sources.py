"""The built-in sources: digits as scikit-learn has them, and image folders as people have them."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from codec_dist.shards import ShardError, digits, image_folder, pack


def test_digits_are_scikit_learns_scaled_to_bytes():
    samples, classes = digits()
    samples = list(samples)
    bundle = load_digits()
    assert classes == list("0123456789")
    assert [sample.label for sample in samples] == bundle.target.tolist()
    assert samples[123].key == "digit-000123"
    for number in (0, 123, 1796):
        image = Image.open(io.BytesIO(samples[number].image))
        assert (image.format, image.mode, image.size) == ("PNG", "L", (8, 8))
        np.testing.assert_allclose(np.asarray(image, dtype=float) * 16 / 255, bundle.images[number], atol=0.04)
    assert max(np.asarray(Image.open(io.BytesIO(sample.image))).max() for sample in samples) == 255


def _image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((2, 2), value, np.uint8)).save(path)


def test_classes_of_an_image_folder_are_its_subfolders_in_order(tmp_path):
    for name in ("zebra/1.png", "ant/b.JPEG", "ant/deep/er.webp", "ant/v1.0 50%.png", "ant/notes.txt", ".hidden/x.png"):
        if name.endswith(".txt"):
            (tmp_path / name).write_text("no image")
        else:
            _image(tmp_path / name)
    samples, classes = image_folder(tmp_path)
    found = [(sample.key, sample.extension, sample.label) for sample in samples]
    assert classes == ["ant", "zebra"]
    assert found == [
        ("ant/b", "jpeg", 0),
        ("ant/v1%2E0 50%25", "png", 0),
        ("ant/deep/er", "webp", 0),
        ("zebra/1", "png", 1),
    ]
    index = pack(image_folder(tmp_path)[0], tmp_path.parent / "packed", classes=classes)
    assert sorted(index.samples()["key"].to_pylist()) == sorted(key for key, _, _ in found)


def test_a_folder_of_images_alone_is_unlabelled(tmp_path):
    _image(tmp_path / "a.png")
    _image(tmp_path / "b.png")
    samples, classes = image_folder(tmp_path)
    assert [(sample.key, sample.label) for sample in samples] == [("a", None), ("b", None)]
    assert classes == []


def test_folders_that_are_no_data_set_are_refused(tmp_path):
    with pytest.raises(ShardError, match="no such folder"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(ShardError, match="holds no images"):
        image_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ShardError, match=r"class folder .*empty holds no images"):
        image_folder(tmp_path)
    _image(tmp_path / "loose.png")
    with pytest.raises(ShardError, match=r"beside class folders, first loose.png"):
        image_folder(tmp_path)
