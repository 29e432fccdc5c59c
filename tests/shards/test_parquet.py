"""Packing from Parquet files: every row an image, labels by number or name, memory bounded, problems named."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from codec_dist.shards import ShardError, is_parquet, load_index, pack, parquet_images, read_shard

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture
def images(png):
    random = np.random.default_rng(3)
    return [png(random.integers(0, 256, (3, 4), dtype=np.uint8)) for _ in range(50)]


def as_datasets_writes(path, images, labels, names=None, **options):
    """A file as the datasets library writes it."""
    table = pa.table(
        {
            "image": pa.array([{"bytes": image, "path": None} for image in images], STRUCT),
            "label": pa.array(labels, pa.int64()),
        }
    )
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path, **options)


def test_files_of_the_datasets_library_are_packed_with_their_class_names(tmp_path, images):
    labels = [number % 3 for number in range(50)]
    for part, rows in enumerate((slice(0, 30), slice(30, 50))):
        file = tmp_path / "set" / "data" / f"train-0000{part}-of-00002.parquet"
        as_datasets_writes(file, images[rows], labels[rows], ["ant", "bee", "cat"], row_group_size=7)
    assert is_parquet(tmp_path / "set")
    samples, classes = parquet_images(tmp_path / "set")
    assert len(samples) == 50
    assert classes == ["ant", "bee", "cat"]
    index = pack(samples, tmp_path / "shards", samples_per_shard=20, classes=classes)
    assert load_index(tmp_path / "shards").classes == ("ant", "bee", "cat")
    found = {item.key: item for info in index.shards for item in read_shard(index.location, info)}
    expected = {
        f"train-0000{number // 30}-of-00002/{number % 30:08d}": (image, label)
        for number, (image, label) in enumerate(zip(images, labels))
    }
    assert set(found) == set(expected)
    originals = {sample.key: sample.image for sample in samples}
    for key, (image, label) in expected.items():
        assert originals[key] == image
        assert (found[key].label, found[key].error) == (label, None)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_labels_may_be_names(tmp_path, images, kind):
    names = ["zebra", "ant", None, "bee", "ant"]
    for part in range(2):
        rows = slice(3 * part, 3 * part + 3)
        table = pa.table({"content": pa.array(images[:5][rows], pa.large_binary()), "cls": pa.array(names[rows], kind)})
        pq.write_table(table, tmp_path / f"{part}.parquet")
    samples, classes = parquet_images(tmp_path / "*.parquet")
    assert classes == ["ant", "bee", "zebra"]
    assert [sample.label for sample in samples] == [2, 0, None, 1, 0]
    assert [sample.key for sample in samples] == ["0/00000000", "0/00000001", "0/00000002", "1/00000000", "1/00000001"]


def test_integer_labels_are_taken_as_they_are_and_minus_one_is_none(tmp_path, images):
    table = pa.table({"img": images[:3], "label": pa.array([7, -1, None], pa.int16())})
    pq.write_table(table, tmp_path / "x.parquet")
    samples, classes = parquet_images(tmp_path / "x.parquet")
    assert classes == []
    assert [sample.label for sample in samples] == [7, None, None]


def test_files_without_labels_are_packed_without(tmp_path, images):
    pq.write_table(pa.table({"img": images, "width": [4] * 50}), tmp_path / "x.parquet")
    samples, classes = parquet_images(tmp_path)
    assert ({sample.label for sample in samples}, classes) == ({None}, [])


def test_extensions_are_told_by_the_bytes_and_else_by_the_name(tmp_path):
    rows = [
        (b"\xff\xd8\xff\xe0", "a.png", "jpg"),
        (b"\x89PNG\r\n\x1a\n", None, "png"),
        (b"RIFF\0\0\0\0WEBPVP8 ", None, "webp"),
        (b"GIF89a", None, "gif"),
        (b"broken", "a/b.JPEG", "jpeg"),
        (b"broken", None, "bin"),
        (b"", "x.tar.gz.cls", "bin"),
    ]
    values = [{"bytes": content, "path": path} for content, path, _ in rows]
    pq.write_table(pa.table({"image": pa.array(values, STRUCT)}), tmp_path / "x.parquet")
    samples, _ = parquet_images(tmp_path / "x.parquet")
    assert [sample.extension for sample in samples] == [extension for *_, extension in rows]


def test_packing_is_the_same_whatever_the_row_groups(tmp_path, images):
    fingerprints = set()
    for size in (1, 7, 50):
        as_datasets_writes(tmp_path / str(size) / "x.parquet", images, range(50), row_group_size=size)
        samples, _ = parquet_images(tmp_path / str(size) / "x.parquet")
        fingerprints.add(pack(samples, tmp_path / f"shards-{size}", samples_per_shard=20).fingerprint)
    assert len(fingerprints) == 1


def test_memory_does_not_grow_with_a_row_group(tmp_path):
    content = [b"\x89PNG\r\n\x1a\n" + os.urandom(100_000) for _ in range(300)]
    as_datasets_writes(tmp_path / "x.parquet", content, range(300), row_group_size=300, write_batch_size=16)
    del content
    samples, _ = parquet_images(tmp_path / "x.parquet")
    before = pa.total_allocated_bytes()
    peak = max(pa.total_allocated_bytes() - before for _ in samples)
    assert peak < 12_000_000, "of 30,000,000"


def test_what_is_parquet_is_told_from_image_folders(tmp_path, images):
    folder = tmp_path / "images" / "ant"
    folder.mkdir(parents=True)
    (folder / "1.png").write_bytes(images[0])
    (folder / "table.parquet").write_bytes(b"")
    assert not is_parquet(tmp_path / "images")
    assert not is_parquet(tmp_path / "nowhere")
    assert is_parquet(tmp_path / "images" / "ant" / "t*")
    assert is_parquet("some/where/*.parquet")


def write(path, **columns):
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"a": [b"1"], "b": [b"2"]}, {}, r"columns a, b may hold images .*--image-column"),
        ({"a": [1]}, {}, r"no column can hold images .*\(columns: a\)"),
        ({"image": [b"1"]}, {"image_column": "imag"}, r"no column 'imag' for images: did you mean image"),
        ({"image": ["x"]}, {"image_column": "image"}, r"'image' of .* is string: images are bytes"),
        (
            {"image": [b"1"], "labels": [[0, 1]]},
            {},
            r"'labels' of .* is list<.*>: labels are whole numbers or strings.*`none`",
        ),
        ({"image": [b"1"], "label": [0], "cls": [0]}, {}, r"columns label, cls .* may hold labels"),
        ({"image": [b"1"], "label": [0]}, {"label_column": "lable"}, r"no column 'lable' .*did you mean label"),
        ({"image": [b"1", None]}, {}, r"1 of 2 rows in row group 0 .* have no image in image"),
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path, columns, options, message):
    write(tmp_path / "x.parquet", **columns)
    with pytest.raises(ShardError, match=message) as caught:
        parquet_images(tmp_path / "x.parquet", **options)
    assert "\n" not in str(caught.value)


def test_one_of_several_columns_can_be_named(tmp_path, images):
    write(tmp_path / "x.parquet", image=images, mask=[b""] * 50, fine=list(range(50)), coarse=[1] * 50)
    samples, _ = parquet_images(tmp_path / "x.parquet", image_column="image", label_column="coarse")
    assert [(sample.image, sample.label) for sample in samples] == [(image, 1) for image in images]


def test_a_missing_image_is_found_without_statistics_too(tmp_path):
    table = pa.table({"image": pa.array([{"bytes": b"x", "path": None}, None], STRUCT)})
    pq.write_table(table, tmp_path / "x.parquet", write_statistics=False)
    samples, _ = parquet_images(tmp_path / "x.parquet")
    with pytest.raises(ShardError, match=r"row 1 of .*x.parquet has no image in image"):
        list(samples)


def test_files_that_do_not_belong_together_or_are_damaged_are_refused(tmp_path, images):
    write(tmp_path / "a.parquet", image=images)
    write(tmp_path / "b.parquet", picture=images)
    with pytest.raises(ShardError, match=r"b.parquet has other columns than .*a.parquet"):
        parquet_images(tmp_path)
    Path(tmp_path, "b.parquet").write_bytes(Path(tmp_path, "a.parquet").read_bytes()[:-20])
    with pytest.raises(ShardError, match=r"b.parquet is not a readable Parquet file"):
        parquet_images(tmp_path)
    with pytest.raises(ShardError, match=r"there are no Parquet files at"):
        parquet_images(tmp_path / "c*.parquet")
    with pytest.raises(ShardError, match=r"read from local paths"):
        parquet_images("s3://bucket/x.parquet")


def test_a_label_below_minus_one_is_refused(tmp_path):
    write(tmp_path / "x.parquet", image=[b"1"], label=[-2])
    with pytest.raises(ShardError, match=r"the label -2 in row 0 of .* is out of range"):
        list(parquet_images(tmp_path / "x.parquet")[0])


@pytest.mark.parametrize(
    "name",
    [
        "target",
        "Targets",
        "label_id",
        "labelId",
        "category",
        "category_id",
        "Label",
        "LABEL",
        "fine_label",
        "Class",
        "class_name",
        "y",
    ],
)
def test_columns_of_labels_are_found_by_their_names(tmp_path, images, name):
    write(tmp_path / "x.parquet", image=images, width=[4] * 50, **{name: list(range(50))}, caption=["a"] * 50)
    samples, _ = parquet_images(tmp_path / "x.parquet")
    assert [sample.label for sample in samples] == list(range(50))
    assert samples.notes == []


def test_several_columns_of_labels_are_named_and_none_is_said(tmp_path, images):
    write(tmp_path / "x.parquet", img=images, fine_label=[1] * 50, coarse_label=[0] * 50)
    with pytest.raises(ShardError, match=r"columns fine_label, coarse_label .*img.*--label-column"):
        parquet_images(tmp_path / "x.parquet")
    write(tmp_path / "y.parquet", img=images, species=["a"] * 50, width=[4] * 50)
    samples, _ = parquet_images(tmp_path / "y.parquet")
    assert "(columns: species, width): name one with --label-column" in samples.notes[0]


def test_texts_that_are_all_integers_keep_their_values(tmp_path, images):
    write(tmp_path / "x.parquet", image=images[:5], label=["7", "10", "-1", "007", None])
    samples, classes = parquet_images(tmp_path / "x.parquet")
    assert ([sample.label for sample in samples], classes) == ([7, 10, None, 7, None], [])
    write(tmp_path / "y.parquet", image=images[:3], label=["7", "10", "ten"])
    samples, classes = parquet_images(tmp_path / "y.parquet")
    assert ([sample.label for sample in samples], classes) == ([1, 0, 2], ["10", "7", "ten"])
    assert "10 (label 0) comes before 7 (label 1)" in samples.notes[0]
    # As spreadsheets and pandas write integers where some are missing.
    write(tmp_path / "z.parquet", image=images[:4], label=["2.0", "10.0", "", " "])
    samples, classes = parquet_images(tmp_path / "z.parquet")
    assert ([sample.label for sample in samples], classes) == ([2, 10, None, None], [])


def test_an_empty_text_is_no_class(tmp_path, images):
    write(tmp_path / "x.parquet", image=images[:3], label=["b", "", "a"])
    samples, classes = parquet_images(tmp_path / "x.parquet")
    assert ([sample.label for sample in samples], classes) == ([1, None, 0], ["a", "b"])
    assert any("empty" in note for note in samples.notes)


def test_whole_numbers_of_other_types_are_labels(tmp_path, images):
    write(tmp_path / "x.parquet", image=images[:4], label=[3.0, float("nan"), None, -1.0])
    assert [sample.label for sample in parquet_images(tmp_path / "x.parquet")[0]] == [3, None, None, None]
    write(tmp_path / "y.parquet", image=images[:2], label=[True, False])
    assert [sample.label for sample in parquet_images(tmp_path / "y.parquet")[0]] == [1, 0]
    write(tmp_path / "z.parquet", image=images[:2], label=[1.0, 0.5])
    with pytest.raises(ShardError, match=r"label 0\.5 in row 1 of .* is no whole number"):
        list(parquet_images(tmp_path / "z.parquet")[0])


def test_labels_can_be_left_out(tmp_path, images):
    write(tmp_path / "x.parquet", image=images[:2], labels=[[1], [2, 3]])
    samples, classes = parquet_images(tmp_path / "x.parquet", label_column="none")
    assert ([sample.label for sample in samples], classes, samples.notes) == ([None, None], [], [])


def test_rows_of_other_formats_are_packed_as_png_and_what_is_no_image_is_said(tmp_path):
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    contents = []
    for form in ("BMP", "TIFF", "GIF", "PPM"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, form)
        contents.append(buffer.getvalue())
    write(tmp_path / "x.parquet", image=[*contents, b"nothing"])
    samples, _ = parquet_images(tmp_path / "x.parquet")
    index = pack(samples, tmp_path / "s")
    items = {item.key: item for item in read_shard(tmp_path / "s", index.shards[0])}
    for number in range(4):
        np.testing.assert_array_equal(np.asarray(items[f"x/{number:08d}"].image.convert("L")), pixels)
    assert "there is no image" in items["x/00000004"].error
    assert "first row 4 of x.parquet" in samples.notes[-1]


def test_a_folder_of_parquet_files_is_read_once_whatever_links_it_holds(tmp_path, images):
    write_to = tmp_path / "in" / "data"
    write_to.mkdir(parents=True)
    write(write_to / "a.PARQUET", image=images)
    (tmp_path / "in" / "README.md").write_text("about")
    for name in ("again", "once-more"):
        (tmp_path / "in" / name).symlink_to("data")
        (write_to / name).symlink_to("..")
    assert is_parquet(tmp_path / "in")
    samples, _ = parquet_images(tmp_path / "in")
    assert len({sample.key for sample in samples}) == len(samples) == 50
    assert samples.left_out.total == 5
    (write_to / "a.PARQUET").unlink()
    assert not is_parquet(tmp_path / "in")
