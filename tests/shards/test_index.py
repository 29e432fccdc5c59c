"""What the index promises: made on demand, kept where it can be, and never silently out of date."""

import contextlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from codec_dist.shards import ShardError, build_index, limit_samples, load_index, pack, read_shard


@pytest.fixture
def foreign(tmp_path, png, tar):
    """Two tars of another maker, without index: labels in .cls and in two fields of .json."""
    pixels = png(np.arange(12, dtype=np.uint8).reshape(3, 4))
    for shard in range(2):
        members = []
        for number in range(3):
            key = f"{shard}{number}"
            details = json.dumps({"label": number, "fine": 10 * number, "name": "x"}).encode()
            members += [(f"{key}.PNG", pixels), (f"{key}.cls", str(number).encode()), (f"{key}.json", details)]
        tar(tmp_path / "foreign" / f"train-{shard}.tar", [("README", b"no extension"), *members])
    return tmp_path / "foreign"


def test_an_index_is_made_on_demand_and_kept_beside_the_tars(foreign):
    index = load_index(foreign)
    assert [(info.name, info.samples) for info in index.shards] == [("train-0.tar", 3), ("train-1.tar", 3)]
    assert index.samples().to_pylist()[4] == {"shard": "train-1.tar", "position": 1, "key": "11", "label": 1}
    assert {path.name for path in foreign.iterdir()} >= {"index.parquet", "index-samples.parquet"}
    assert load_index(foreign) == index


def test_labels_may_come_from_a_field_of_the_json_member(foreign, tmp_path):
    plain = load_index(foreign)
    fine = load_index(foreign, tmp_path / "cache", label_field="json:fine")
    assert fine.samples()["label"].to_pylist() == [0, 10, 20] * 2
    assert fine.fingerprint != plain.fingerprint
    assert load_index(foreign) == plain, "the index beside the tars is left as it is"
    (foreign / "train-0.tar").touch()
    kept = load_index(foreign, tmp_path / "cache", label_field="json:fine")
    assert kept == fine
    assert Path(kept.kept_in) == tmp_path / "cache"


def test_a_label_field_that_no_sample_has_is_refused(foreign):
    with pytest.raises(ShardError, match=r"no sample in .* has an integer label in json:clss"):
        load_index(foreign, label_field="json:clss")


def test_an_index_in_the_cache_serves_only_its_own_location(foreign, packed, tmp_path):
    cache = tmp_path / "cache"
    load_index(foreign)
    load_index(foreign, cache, label_field="json:label")
    assert load_index(packed.location, cache) == packed
    elsewhere = pack_copy(packed, tmp_path / "copy")
    assert load_index(elsewhere, cache).shards == packed.shards


def pack_copy(index, folder):
    folder.mkdir()
    for info in index.shards:
        (folder / info.name).write_bytes(Path(index.location, info.name).read_bytes())
    return folder


def test_a_moved_folder_keeps_its_index(packed, tmp_path):
    Path(packed.location).rename(tmp_path / "moved")
    moved = load_index(tmp_path / "moved")
    assert (moved.shards, moved.fingerprint, moved.classes) == (packed.shards, packed.fingerprint, packed.classes)
    assert moved.samples().num_rows == 25


def test_missing_shards_are_named_and_counted(packed):
    Path(packed.location, "shard-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"1 of 3 shards are missing in .*first shard-000001.tar") as caught:
        load_index(packed.location)
    assert "\n" not in str(caught.value)


def test_new_tars_and_tars_of_another_size_are_refused_until_indexed_anew(packed, png, tar):
    extra = Path(packed.location, "extra.tar")
    tar(extra, [("k.png", png(np.zeros((2, 2), np.uint8)))])
    with pytest.raises(
        ShardError, match=r"1 tars that its index does not know, first extra.tar.*codec-dist shards index"
    ):
        load_index(packed.location)
    assert build_index(packed.location).sample_count == 26
    assert load_index(packed.location).sample_count == 26
    extra.write_bytes(extra.read_bytes()[:1000])
    with pytest.raises(ShardError, match=r"extra.tar has 1,000 bytes where the index says .*cut short or was replaced"):
        load_index(packed.location)


def test_a_folder_without_tars_and_no_folder_are_refused(tmp_path):
    with pytest.raises(ShardError, match="no tars in"):
        load_index(tmp_path)
    with pytest.raises(ShardError, match="there is no such folder"):
        load_index(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ShardError):
        load_index(tmp_path / "file")


def test_a_tar_that_is_no_tar_is_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"these bytes are not a tar at all" * 40)
    with pytest.raises(ShardError, match=r"x.tar is damaged"):
        load_index(tmp_path)


def test_a_damaged_index_is_refused_with_a_remedy(packed):
    samples = Path(packed.location, "index-samples.parquet")
    content = samples.read_bytes()
    samples.unlink()
    with pytest.raises(ShardError, match=r"index-samples.parquet is missing: index again"):
        load_index(packed.location).samples()
    samples.write_bytes(content[:50])
    with pytest.raises(ShardError, match="not a readable Parquet file"):
        load_index(packed.location).samples()
    Path(packed.location, "index.parquet").write_bytes(content)
    with pytest.raises(ShardError, match="is not an index of shards"):
        load_index(packed.location)


def test_an_index_of_samples_of_other_shards_is_noticed(packed, tmp_path, samples_of):
    other = pack(samples_of(25, prefix="other"), tmp_path / "other", samples_per_shard=10)
    stolen = Path(other.location, "index-samples.parquet").read_bytes()
    Path(packed.location, "index-samples.parquet").write_bytes(stolen)
    with pytest.raises(ShardError, match=r"does not belong to the index.parquet beside it"):
        load_index(packed.location).samples()


@pytest.mark.parametrize("content", ["{", "[]", '{"0": "a", "2": "b"}', "[1, 2]", '"names"'])
def test_bad_class_names_are_refused(packed, content):
    Path(packed.location, "classes.json").write_text(content)
    with pytest.raises(ShardError, match=r"classes.json"):
        load_index(packed.location)


def test_class_names_may_be_an_object_by_label(packed):
    Path(packed.location, "classes.json").write_text('{"1": "b", "0": "a", "2": "c"}')
    assert load_index(packed.location).classes == ("a", "b", "c")


@pytest.mark.parametrize(
    ("limit", "counts"), [(1, [1]), (10, [10]), (13, [10, 3]), (25, [10, 10, 5]), (99, [10, 10, 5])]
)
def test_a_limit_takes_the_first_samples(packed, limit, counts):
    limited = limit_samples(packed, limit)
    assert [info.samples for info in limited.shards] == counts
    assert limited.samples().equals(packed.samples().slice(0, limit))
    keys = [item.key for info in limited.shards for item in read_shard(limited.location, info)]
    assert keys == packed.samples()["key"].to_pylist()[:limit]
    assert (limited.fingerprint == packed.fingerprint) == (limit >= 25)


def test_a_limit_below_one_is_refused(packed):
    with pytest.raises(ShardError, match="limit of 0"):
        limit_samples(packed, 0)


@contextlib.contextmanager
def unprivileged():
    """As a user to whom permissions apply."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_the_index_of_a_read_only_folder_is_kept_in_the_cache(foreign):
    expected = load_index(foreign)  # all that is imported on the way is imported now
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name, "shards"), Path(name, "cache")
        folder.mkdir()
        for tar_file in foreign.glob("*.tar"):
            shutil.copy(tar_file, folder)
        cache.mkdir()
        for path, mode in ((Path(name), 0o755), (cache, 0o777), (folder, 0o555)):
            path.chmod(mode)
        with unprivileged():
            index = load_index(folder, cache)
            assert index.shards == expected.shards
            assert index.kept_in == str(cache)
            assert load_index(folder, cache) == index
            assert load_index(folder).kept_in is None
        assert sorted(path.suffix for path in folder.iterdir()) == [".tar", ".tar"]


def test_an_index_without_a_column_of_problems_is_read(packed):
    path = Path(packed.location, "index.parquet")
    assert pq.read_table(path).column_names == ["name", "samples", "bytes", "fingerprint"]
    metadata = pq.read_table(path).schema.metadata
    table = pq.read_table(path).replace_schema_metadata({k: v for k, v in metadata.items() if k != b"classes"})
    pq.write_table(table, path)
    assert load_index(packed.location) == packed


def test_imagenet_as_others_pack_it_is_indexed_on_demand(tmp_path, tar):
    def jpeg(value):
        content = io.BytesIO()
        Image.new("RGB", (9, 7), (value, 0, 0)).save(content, format="JPEG")
        return content.getvalue()

    for number in range(2):
        keys = [f"n0144076{number}_{image}" for image in range(4)]
        members = [(f"{key}.{kind}", content) for image, key in enumerate(keys)
                   for kind, content in (("cls", b"%d" % (500 * number + image)), ("jpg", jpeg(image)))]  # fmt: skip
        tar(tmp_path / "s" / f"imagenet-train-{number:06d}.tar", members)
    index = load_index(tmp_path / "s", tmp_path / "cache")
    assert index.sample_count == 8
    assert index.samples()["label"].to_pylist() == [0, 1, 2, 3, 500, 501, 502, 503]
    items = [item for info in index.shards for item in read_shard(index.location, info)]
    assert [item.label for item in items] == [0, 1, 2, 3, 500, 501, 502, 503]
    assert {(item.error, item.image.mode, item.image.size) for item in items} == {(None, "RGB", (9, 7))}
