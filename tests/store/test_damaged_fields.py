"""Whatever the small files of a store hold, reading them neither hangs nor fails with anything but a StoreError."""

import copy
import json
import math
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codec_dist.store import ContributionStore, Ledger, StoreError, finish_store, repair_store, verify_store
from codec_dist.store.checksums import checksum
from codec_dist.utils import hash_json

SHARED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

NUMBERS = st.sampled_from([-1, 0, 1, 2, 5, 7, 10**12, 10**400, -(10**30), 1.0, 1e12, -0.5, 1e308, math.nan, math.inf])
PLAIN = (
    NUMBERS
    | st.none()
    | st.booleans()
    | st.text(max_size=5)
    | st.sampled_from(["\ud800", "crc32c:", "a\0b", "x" * 999])
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in items for place in places(each, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn, original: dict[str, Any]) -> Any:
    """``original`` with one to three of its values replaced, removed or added to."""
    values: Any = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(values)))
        if not path:
            return draw(VALUES)
        holder = values
        for key in path[:-1]:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if action == "remove":
            del holder[path[-1]]
        elif action == "add" and isinstance(holder, dict):
            holder[draw(st.text(max_size=6))] = draw(VALUES)
        else:
            holder[path[-1]] = draw(VALUES)
    return values


def signed(values: Any) -> bytes:
    """A marker's bytes with the checksum that its writer would have given it, where it can have one."""
    if isinstance(values, dict):
        body = {name: value for name, value in values.items() if name != "checksum"}
        try:
            values = body | {"checksum": hash_json(body)}
        except ValueError:
            values = body | {"checksum": "0" * 64}
    return json.dumps(values).encode()


def look_everywhere(path) -> None:
    """All that reads a ledger; damage may be an error of the store, and nothing else."""
    for full in (False, True):
        str(verify_store(path, full=full))
    Ledger(path).pending()
    store = ContributionStore(path)
    str(store.info())
    with suppress(StoreError):
        store.digest()


@given(data=st.data())
@SHARED
def test_any_change_of_a_marker_is_found_or_harmless(full, data):
    path = full.path / "ledger" / "000001.json"
    content = path.read_bytes()
    original = json.loads(content)
    changed = data.draw(mutated(original))
    path.write_bytes(signed(changed))
    try:
        look_everywhere(full.path)
        # The marker of shard 1 has no dropped samples, so what may differ is how long it took, and how often.
        harmless = {"seconds", "attempt", "checksum"}
        same = isinstance(changed, dict) and all(
            name in harmless
            or (name in changed and type(changed[name]) is type(original[name]) and changed[name] == original[name])
            for name in original
        )
        if not same:
            assert Ledger(full.path).pending() == [1]
            assert verify_store(full.path).damaged == [1]
    finally:
        path.write_bytes(content)


@given(end=st.integers(0, 900))
@SHARED
def test_a_truncated_marker_is_damage(full, end):
    path = full.path / "ledger" / "000001.json"
    content = path.read_bytes()
    path.write_bytes(content[: end % len(content.rstrip())])
    try:
        look_everywhere(full.path)
        assert Ledger(full.path).pending() == [1]
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"rows":' * 50_000, b"\xff\xfe", b"1" * 5000, b"null", b"[1, 2]", b'{"checksum": 3}'],
    ids=["nested lists", "nested objects", "no text", "a huge number", "null", "a list", "other fields"],
)
def test_what_is_no_marker_at_all_is_damage_that_repair_and_writing_again_undo(full, content):
    finish_store(full.path)
    digest = ContributionStore(full.path).digest()
    path = full.path / "ledger" / "000001.json"
    path.write_bytes(content)
    look_everywhere(full.path)
    assert repair_store(full.path, verify_store(full.path)) == [1]
    full.write(1)
    finish_store(full.path)
    assert verify_store(full.path).ok
    assert ContributionStore(full.path).digest() == digest


def attributes_file(plan):
    return plan.path / "arrays.zarr" / "zarr.json"


@given(data=st.data())
@SHARED
def test_any_change_of_a_stores_attributes_is_refused_in_one_line_or_harmless(full, data):
    path = attributes_file(full)
    content = path.read_bytes()
    path.write_text(json.dumps(data.draw(mutated(json.loads(content)))))
    try:
        with suppress(StoreError):
            look_everywhere(full.path)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("change", ["a column less", "another type", "other rows", "a row less", "another shard"])
def test_a_table_of_samples_that_is_whole_but_not_this_shards_is_damage(full, change):
    finish_store(full.path)
    name = full.path / "samples" / "000001.parquet"
    table = pq.read_table(name)
    column = {
        "another type": ("label", table["label"].cast(pa.string())),
        "other rows": ("row", pa.array([row + 1 for row in table["row"].to_pylist()], pa.int64())),
        "another shard": ("shard", pa.array(["s-0.tar"] * len(table))),
    }.get(change)
    if column is not None:
        table = table.set_column(table.column_names.index(column[0]), *column)
    table = {"a column less": table.drop_columns(["key"]), "a row less": table[1:]}.get(change, table)
    pq.write_table(table, name)
    marker = full.path / "ledger" / "000001.json"
    # As a writer with an error would have left it: the marker agrees with the file.
    marker.write_bytes(signed(json.loads(marker.read_bytes()) | {"samples": f"crc32c:{checksum(name.read_bytes())}"}))
    merged = full.path / "samples.parquet"
    pq.write_table(table, merged)
    found = verify_store(full.path, full=False)
    assert found.damaged == [1]
    with pytest.raises(StoreError, match=r"samples of shard s-1\.tar"):
        _ = ContributionStore(full.path).samples
    repair_store(full.path, found)
    full.write(1)
    finish_store(full.path)
    assert verify_store(full.path).ok


def test_a_merged_table_with_wrong_rows_is_made_again(full):
    finish_store(full.path)
    merged = full.path / "samples.parquet"
    table = pq.read_table(merged)
    rows = pa.array(reversed(table["row"].to_pylist()), pa.int64())
    pq.write_table(table.set_column(table.column_names.index("row"), "row", rows), merged)
    expected = [row for number in range(3) for row in range(number * 6, number * 6 + full.rows(number))]
    assert ContributionStore(full.path).samples["row"].to_pylist() == expected
    found = verify_store(full.path, full=False)
    assert [problem.kind for problem in found.problems] == ["table"]
    repair_store(full.path, found)
    assert verify_store(full.path).ok
