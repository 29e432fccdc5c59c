"""Where rows and chunks are: the store's arithmetic against Zarr's own indexing, for any shards and chunks."""

from pathlib import Path

import numpy as np
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.core.buffer.cpu import Buffer
from zarr.storage import MemoryStore

from codec_dist.store.chunks import group_files
from codec_dist.store.layout import Layout
from codec_dist.store.place import LocalPlace

LAYOUTS = st.builds(
    lambda samples, channels, dtype, sharding: Layout(
        LocalPlace(Path("x")),
        {},
        {f"layer.{number}": count for number, count in enumerate(channels)},
        ("t",),
        ("contribution-positive", "activation-negative"),
        tuple((str(number), count) for number, count in enumerate(samples)),
        dtype,
        {},
        sharding=sharding,
    ),
    samples=st.lists(st.integers(0, 5000), min_size=1, max_size=6),
    channels=st.lists(st.integers(1, 20_000), min_size=1, max_size=3),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    sharding=st.none() | st.integers(1, 6000),
)


@given(layout=LAYOUTS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_row_is_in_the_file_in_which_zarr_looks_for_it(layout, data):
    files = {name: Buffer.from_bytes(content) for name, content in group_files(layout).items()}
    group = zarr.open_group(MemoryStore(files), mode="r")
    layer = data.draw(st.sampled_from(list(layout.layers)))
    number = data.draw(st.integers(0, len(layout.shards) - 1))
    row = data.draw(st.integers(0, layout.block_rows - 1))
    array = group[layout.array_path(layer, "contribution-positive")]
    assert array.shape == (len(layout.shards) * layout.block_rows, layout.layers[layer])
    rows_of_file = (array.shards or array.chunks)[0]
    key = array.metadata.encode_chunk_key(((layout.block_start(number) + row) // rows_of_file, 0))
    found = layout.chunk_file(layer, "contribution-positive", number, row // layout.chunk_rows)
    assert found == f"arrays.zarr/{layout.array_path(layer, 'contribution-positive')}/{key}"


@given(layout=LAYOUTS)
def test_no_two_shards_share_a_file_and_every_block_fills_its_files(layout):
    seen: set[str] = set()
    for number, (_, samples) in enumerate(layout.shards):
        parts = range(layout.parts(layout.block_rows))
        files = {layout.chunk_file("layer.0", "activation-negative", number, part) for part in parts}
        begun = [layout.chunk_file("layer.0", "activation-negative", number, part) for part in layout.file_parts()]
        assert files == set(begun)
        assert len(begun) == len(files)
        assert not files & seen
        seen |= files
        assert layout.parts(samples) <= len(parts)
        assert samples <= layout.block_rows
        # The valid rows of the parts add up to the shard's.
        rows = [min(layout.chunk_rows, samples - part * layout.chunk_rows) for part in range(layout.parts(samples))]
        assert sum(rows) == samples
        assert all(1 <= count <= layout.chunk_rows for count in rows)
    assert layout.block_rows == layout.parts(layout.block_rows) * layout.chunk_rows
    assert layout.block_rows - max(1, *(samples for _, samples in layout.shards)) < layout.chunk_rows


@given(layout=LAYOUTS)
def test_blocks_lie_one_after_the_other(layout):
    starts = [layout.block_start(number) for number in range(len(layout.shards))]
    np.testing.assert_array_equal(starts, np.arange(len(layout.shards)) * layout.block_rows)
