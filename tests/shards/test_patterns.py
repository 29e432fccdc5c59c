"""Patterns for shards: what they name is read and indexed by itself, and nothing that they might mean is ignored."""

import functools
import http.server
import threading
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
from braceexpand import braceexpand
from hypothesis import given
from hypothesis import strategies as st

from codec_dist.shards import ShardError, build_index, load_index, read_shard, shards_folder
from codec_dist.shards.patterns import NamePattern


@pytest.fixture
def both(tmp_path, tar, png):
    """A folder with training and validation tars, as timm's ImageNet has it, with one image in each."""
    for part, count in (("train", 12), ("validation", 3)):
        for number in range(count):
            image = png(np.full((2, 2), number, np.uint8))
            tar(tmp_path / "in" / f"imagenet1k-{part}-{number:03d}.tar", [(f"{part}{number}.png", image)])
    return tmp_path / "in"


def names(index):
    return [shard.name for shard in index.shards]


PIECES = st.sampled_from(["a", "b-", "{0..3}", "{08..11}", "{x,yy}", "{3..1}", "*", "?", "[ab]", ".tar"])


@given(st.lists(PIECES, min_size=1, max_size=4).map("".join), st.text("ab-0123789xy.tr", max_size=9))
def test_patterns_mean_what_the_shell_means(text, name):
    expanded = list(braceexpand(text))
    pattern = NamePattern(text)
    for each in (name, *expanded[:3], *expanded[-3:]):
        assert pattern.matches(each) == any(fnmatchcase(each, glob) for glob in expanded)


def test_a_pattern_is_read_as_a_folder_with_these_tars_alone(both, tmp_path):
    location = f"{both}/imagenet1k-train-*.tar"
    index = load_index(location)
    assert names(index) == [f"imagenet1k-train-{number:03d}.tar" for number in range(12)]
    items = [item for shard in index.shards for item in read_shard(index.location, shard)]
    assert [item.key for item in items] == [f"train{number}" for number in range(12)]
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in names(index):
        (alone / name).write_bytes((both / name).read_bytes())
    assert load_index(alone).fingerprint == index.fingerprint
    assert load_index(alone).samples().equals(index.samples())
    assert shards_folder(location) == str(both)


def test_indexes_of_a_folder_and_of_patterns_in_it_leave_each_other_alone(both, tmp_path):
    locations = [str(both), f"{both}/*-train-*.tar", f"{both}/*-validation-*.tar", f"{both}/*-train-{{000..003}}.tar"]
    made = [build_index(each) for each in locations]
    assert [index.sample_count for index in made] == [15, 12, 3, 4]
    again = [load_index(each, tmp_path / "cache") for each in locations]
    assert again == made
    assert [index.samples().num_rows for index in again] == [15, 12, 3, 4]
    assert not (tmp_path / "cache").exists()


def test_the_cache_keeps_an_index_for_each_pattern(both, tmp_path):
    cache, url = tmp_path / "cache", f"{both}/*-{{}}-*.tar"
    for label_field in ("cls", "txt"):
        counts = [
            load_index(url.replace("{}", part), cache, label_field).sample_count for part in ("train", "validation")
        ]
        assert counts == [12, 3]
    assert len(list(cache.iterdir())) == 4


def test_a_new_tar_that_fits_the_pattern_is_noticed_and_another_is_not(both):
    location = f"{both}/*-validation-*.tar"
    load_index(location)
    content = (both / "imagenet1k-train-000.tar").read_bytes()
    (both / "imagenet1k-train-999.tar").write_bytes(content)
    assert load_index(location).sample_count == 3
    (both / "imagenet1k-validation-999.tar").write_bytes(content)
    with pytest.raises(ShardError, match=r"1 tars that its index does not know, first imagenet1k-validation-999.tar"):
        load_index(location)


def test_one_tar_and_braces_name_tars(both):
    assert names(load_index(both / "imagenet1k-validation-001.tar")) == ["imagenet1k-validation-001.tar"]
    found = names(load_index(f"{both}/imagenet1k-train-{{009..011}}.tar"))
    assert found == [f"imagenet1k-train-{number:03d}.tar" for number in (9, 10, 11)]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "imagenet22k-*.tar",
            r"no tar in .* matches imagenet22k-\*.tar \(it holds 15 tars, first imagenet1k-train-000.tar",
        ),
        ("imagenet1k-train-{010..013}.tar", r"2 of 4 tars .* do not exist, first imagenet1k-train-012.tar"),
        ("one.tar", r"1 of 1 tars .* do not exist, first one.tar"),
        ("a-{0..9.tar*", r"nested or unclosed braces"),
        ("{0..9}{000000..999999}*", r"more than 1,000,000 names"),
    ],
)
def test_patterns_that_name_nothing_are_one_line(both, pattern, message):
    with pytest.raises(ShardError, match=message) as caught:
        load_index(f"{both}/{pattern}")
    assert "\n" not in str(caught.value)
    assert not list(both.glob("*.parquet"))


def test_folders_of_odd_names_are_folders(both, tmp_path):
    for name in ("x.tar", "a[1]", "{b}", "what?"):
        both.rename(tmp_path / name)
        both = tmp_path / name
        assert load_index(both).sample_count == 15


@pytest.mark.parametrize(
    "name",
    ["more.tar.gz", "more.tgz", "more.TAR.GZ", "more.tar.zst", "more.tbz2", "more.tar.xz", "more.tar.lzo",
     "more.tar.7z", "more.tar.001", "more.tar.aa", "more.tar.part", "more.tar.crdownload"],
)  # fmt: skip
def test_tars_that_are_compressed_or_parts_are_never_ignored(both, name):
    index = load_index(both)
    (both / name).write_bytes(b"compressed")
    for load in (load_index, build_index):
        with pytest.raises(ShardError, match=rf"1 of the tars in .* are compressed or incomplete, first {name}"):
            load(both)
    assert load_index(f"{both}/imagenet1k-*.tar").sample_count == index.sample_count


@pytest.mark.parametrize("name", ["more.tar.idx", "more.tar.json", "more.tar.sha256", "more.tar.md5", "more.zip"])
def test_other_files_may_lie_beside_tars(both, name):
    (both / name).write_bytes(b"whatever")
    assert load_index(both).sample_count == 15


def test_tars_whose_suffix_is_in_capitals_are_read(both):
    Path(both, "imagenet1k-train-000.tar").rename(both / "more.TAR")
    index = load_index(both)
    assert "more.TAR" in names(index)
    assert index.sample_count == 15


@pytest.mark.parametrize("listing", [True, False])
def test_patterns_on_web_servers(both, listing):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def list_directory(self, path):
            return super().list_directory(path) if listing else self.send_error(403)

    handler = functools.partial(Quiet, directory=str(both.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            url = f"http://127.0.0.1:{running.server_port}/in"
            exact = load_index(f"{url}/imagenet1k-validation-{{000..002}}.tar")
            assert names(exact) == [f"imagenet1k-validation-{number:03d}.tar" for number in range(3)]
            assert [item.error for item in read_shard(exact.location, exact.shards[2])] == [None]
            if listing:
                assert names(load_index(f"{url}/*-validation-*.tar")) == names(exact)
        finally:
            running.shutdown()
            thread.join()
