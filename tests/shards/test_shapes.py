"""What ``shapes`` promises: pictures by seed and number alone, of classes whose parts are known and shown."""

import hashlib
import io
import json
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from traced import peak_of

from codec_dist.shards import ShardError, pack, read_parts, read_shard, shape_parts, shapes
from codec_dist.shards.shapes import COLOURS, KINDS, MOST_CLASSES, PLACES, _cover, encode_jpeg, encode_png


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    batch=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_encoded_png_is_read_back_pixel_by_pixel(height, width, batch, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
    for image, content in zip(pixels, encode_png(pixels)):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), image)


@pytest.mark.parametrize(("height", "width"), [(13107, 1), (149, 146), (224, 224), (300, 500)])
def test_png_of_several_stored_blocks_is_sound(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    (content,) = encode_png(pixels)
    with Image.open(io.BytesIO(content)) as image:
        image.verify()  # checksums of all chunks
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), pixels[0])
    start = content.index(b"IDAT") + 4
    (length,) = np.frombuffer(content[start - 8 : start - 4], ">u4")
    assert len(zlib.decompress(content[start : start + int(length)])) == height * (1 + 3 * width)


def test_jpeg_is_close_to_the_pixels():
    pixels = np.full((1, 16, 16, 3), (200, 40, 90), np.uint8)
    (content,) = encode_jpeg(pixels)
    image = Image.open(io.BytesIO(content))
    assert image.format == "JPEG"
    np.testing.assert_allclose(np.asarray(image, dtype=int), pixels[0], atol=4)


def by_key(samples):
    return {sample.key: sample for sample in samples}


@pytest.mark.parametrize(("size", "image_format"), [(8, "png"), (31, "png"), (16, "jpg")])
def test_a_picture_depends_on_seed_and_number_alone(size, image_format):
    many, classes = shapes(700, size, 7, image_format, seed=3)
    expected = list(many)
    few, _ = shapes(40, size, 7, image_format, seed=3)
    assert list(few) == expected[:40]
    backwards = list(many.read([699, 5, 300, 5]))
    assert backwards == [expected[699], expected[5], expected[300], expected[5]]
    assert list(many.keys()) == [sample.key for sample in expected]
    assert [sample.label for sample in expected] == [number % 7 for number in range(700)]
    assert len({sample.image for sample in expected}) == 700
    other, names = shapes(40, size, 7, image_format, seed=4)
    assert names == classes
    assert all(one.image != another.image for one, another in zip(other, expected))


def test_png_pictures_are_the_same_bytes_on_every_machine():
    hashes = []
    for size in (8, 33):
        samples, _ = shapes(50, size, 10, seed=1)
        hashes.append(hashlib.sha256(b"".join(sample.image for sample in samples)).hexdigest()[:16])
    assert hashes == ["78a069023734d92c", "9a8f877878bfc87f"]


def test_all_classes_have_three_parts_in_three_places_and_no_two_are_equal():
    for classes in (1, 2, 10, 100, 1000):
        parts = shape_parts(classes)
        table = parts.table()
        assert table.shape == (len(parts.parts), classes)
        assert (table.sum(axis=0) == 3).all()
        assert len(set(map(bytes, table.T))) == classes
        assert table.any(axis=1).all(), "every part belongs to a class"
        assert len(set(parts.parts)) == len(parts.parts)
        for numbers in parts.classes:
            assert len({parts.parts[number].place for number in numbers}) == 3
        names = parts.class_names()
        assert len(set(names)) == classes
        assert all(parts.parts[number].name in names[0] for number in parts.classes[0])
        if classes >= 10:
            assert np.median(table.sum(axis=1)) >= 2, "parts are shared"


def test_a_part_keeps_its_classes_whatever_the_seed():
    assert shape_parts(20) == shape_parts(20)
    assert shapes(1, 8, 20, seed=1)[0].parts == shapes(1, 8, 20, seed=2)[0].parts == shape_parts(20)


def quarters(pixels):
    half = len(pixels) // 2
    return dict(zip(PLACES, (pixels[:half, :half], pixels[:half, half:], pixels[half:, :half], pixels[half:, half:])))


@pytest.mark.parametrize("size", [16, 64, 225])
def test_pictures_show_the_parts_of_their_class_and_nothing_else(size):
    samples, _ = shapes(60, size, 30)
    palette = np.array(list(COLOURS.values()), float)
    for sample in samples:
        pixels = np.asarray(Image.open(io.BytesIO(sample.image)), float)
        parts = {
            samples.parts.parts[part].place: samples.parts.parts[part] for part in samples.parts.classes[sample.label]
        }
        for place, quarter in quarters(pixels).items():
            saturation = quarter.max(axis=2) - quarter.min(axis=2)
            colourful = quarter[saturation > 90]
            if place not in parts:
                assert len(colourful) == 0
                continue
            colour = np.median(colourful, axis=0)
            angles = palette @ colour / np.linalg.norm(palette, axis=1)
            assert list(COLOURS)[angles.argmax()] == parts[place].colour


@pytest.mark.parametrize(
    ("kind", "area"),
    [
        ("disc", np.pi),
        ("square", (2 * 0.86) ** 2),
        ("triangle", (0.5 + 0.62 / 2) / 0.8660254 * 1.62),
        ("ring", np.pi * (1 - 0.48**2)),
        ("cross", 2 * 2 * 0.68 - 0.68**2),
        ("diamond", 2 * 1.1**2),
    ],
)
@pytest.mark.parametrize("turn", [0.5, 0.9])
def test_parts_cover_the_area_of_their_shape(kind, area, turn):
    draws = np.array([[0.5, 0.5, turn, 0.25, 0.5]], np.float32)  # in the middle
    cover, _ = _cover(np.array([KINDS.index(kind)]), draws, 100)
    radius = (0.62 + 0.25 * 0.2) * 50
    assert cover.sum() == pytest.approx(area * radius**2, rel=0.01)
    rows, columns = np.nonzero(cover[0])
    if kind != "triangle":
        assert rows.mean() == pytest.approx(49.5, abs=0.5)
    assert columns.mean() == pytest.approx(49.5, abs=1.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "0 shapes were requested"),
        ({"size": 3}, "3 × 3 pixels were requested"),
        ({"size": 5000}, "5000 × 5000 pixels"),
        ({"classes": 0}, "0 classes of shapes"),
        ({"classes": MOST_CLASSES + 1}, "there can be 1 to"),
        ({"image_format": "jpeg"}, "unknown format of shapes 'jpeg': did you mean jpg"),
    ],
)
def test_shapes_that_cannot_be_had_are_refused(options, message):
    with pytest.raises(ShardError, match=message):
        shapes(**{"count": 5, "size": 8} | options)


def test_packed_shapes_carry_their_table_of_parts(tmp_path):
    samples, classes = shapes(90, 8, 12, seed=5)
    folder = tmp_path / "shards"
    index = pack(samples, folder, samples_per_shard=40, classes=classes, beside=samples.beside)
    assert read_parts(folder) == samples.parts
    assert json.loads((folder / "classes.json").read_text()) == samples.parts.class_names()
    expected = by_key(samples)
    for info in index.shards:
        for item in read_shard(folder, info):
            pixels = Image.open(io.BytesIO(expected[item.key].image))
            np.testing.assert_array_equal(np.asarray(item.image), np.asarray(pixels))
            assert item.label == expected[item.key].label
    assert read_parts(tmp_path) is None
    (folder / "parts.json").write_text('{"parts": [], "classes": [[3]]}')
    with pytest.raises(ShardError, match=r"parts.json is no table of parts"):
        read_parts(folder)


def test_packing_more_shapes_takes_hardly_more_memory(tmp_path):
    setup = "from codec_dist.shards import pack, shapes"
    work = "pack(shapes(int(sys.argv[1]), 8, 10)[0], sys.argv[2], samples_per_shard=500)"
    peaks = [peak_of(setup, work, count, tmp_path / str(count)) for count in (1_000, 4_000)]
    assert (peaks[1] - peaks[0]) / 3_000 < 150, "bytes per sample"
