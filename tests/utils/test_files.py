"""Files are whole or absent, and names survive being file names."""

import errno
import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_disk import small_disk

from codec_dist.utils import (
    CodecError,
    DiskFullError,
    Registry,
    derive_seed,
    escape_name,
    full_disk,
    hash_file,
    hash_json,
    naming_full_disk,
    read_json,
    unescape_name,
    write_bytes_atomically,
    write_json_atomically,
)


def test_written_json_is_read_back(tmp_path: Path) -> None:
    value = {"naïve": [1, 2.5, None, {"deep": "ok"}]}
    write_json_atomically(tmp_path / "new" / "file.json", value)
    assert read_json(tmp_path / "new" / "file.json") == value


def test_full_disk_keeps_the_old_content_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "marker.json"
    write_bytes_atomically(path, b"old")
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from codec_dist.utils import write_bytes_atomically\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_bytes_atomically(Path(sys.argv[1]), b'x' * 5000)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert "OSError" in result.stderr
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["marker.json"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


def _caught(call: Callable[[], object]) -> BaseException:
    with pytest.raises(RuntimeError) as caught:
        call()
    return caught.value


def _close_after_full_disk(cause: bool) -> None:
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        if cause:
            raise RuntimeError("the file was closed half written") from error
        raise RuntimeError("the file was closed half written")  # noqa: B904  as libraries do


def _write_elsewhere_after_full_disk() -> None:
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        raise RuntimeError("another thing is wrong") from None


def test_a_full_disk_is_known_also_from_what_a_library_made_of_it() -> None:
    for cause in (True, False):
        assert full_disk(_caught(lambda cause=cause: _close_after_full_disk(cause))) is not None
    assert full_disk(_caught(_write_elsewhere_after_full_disk)) is None
    circle, other = RuntimeError("one"), RuntimeError("other")
    circle.__cause__, other.__context__ = other, circle
    assert full_disk(circle) is None


def test_atomic_files_obey_the_umask(tmp_path: Path) -> None:
    write_bytes_atomically(tmp_path / "atomic", b"")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@given(st.text())
def test_escaped_names_are_safe_and_reversible(name: str) -> None:
    # Lone surrogates cannot be file names at all.
    name = name.encode("utf-8", "ignore").decode()
    escaped = escape_name(name)
    assert unescape_name(escaped) == name
    assert "/" not in escaped
    assert not escaped.startswith(".")
    assert ":" not in escaped


def test_layer_keys_stay_readable_as_file_names() -> None:
    assert escape_name("blocks.3.mlp.fc2@input") == "blocks.3.mlp.fc2@input"


def test_hash_ignores_the_order_of_keys_but_no_value() -> None:
    assert hash_json({"a": 1, "b": [2]}) == hash_json({"b": [2], "a": 1})
    assert hash_json({"a": 1}) != hash_json({"a": 1.5})
    with pytest.raises(ValueError, match="JSON compliant"):
        hash_json({"a": float("nan")})


def test_file_hash_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert hash_file(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@given(st.lists(st.one_of(st.integers(), st.text()), max_size=4), st.lists(st.one_of(st.integers(), st.text())))
def test_derived_seeds_differ_between_streams_and_fit_torch(first: list[int | str], second: list[int | str]) -> None:
    first, second = (
        [p.encode("utf-8", "ignore").decode() if isinstance(p, str) else p for p in q] for q in (first, second)
    )
    assert 0 <= derive_seed(*first) < 2**63
    key = json.dumps(first), json.dumps(second)
    if key[0] != key[1] and not any(isinstance(p, str) and "\x1f" in p for p in first + second):
        assert derive_seed(*first) != derive_seed(*second)


class _Shape:
    def __init__(self, sides: int, colour: str = "red", *, seed: int = 0) -> None:
        if sides < 3:
            raise ValueError("a shape needs 3 sides")
        self.made = (sides, colour, seed)


@pytest.fixture
def shapes() -> Registry[_Shape]:
    registry: Registry[_Shape] = Registry("shape")
    registry.register("polygon")(_Shape)
    return registry


def test_registry_builds_from_options_and_context(shapes: Registry[_Shape]) -> None:
    assert shapes.build("polygon", {"sides": 4}, seed=7).made == (4, "red", 7)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("polygone", {}, "unknown shape 'polygone': did you mean polygon?"),
        ("polygon", {"side": 3}, "has no option 'side': did you mean sides?"),
        ("polygon", {"colour": "red"}, "needs the option 'sides'"),
        ("polygon", {"sides": 2}, "a shape needs 3 sides"),
        ("polygon", {"sides": 3, "seed": 1}, "has no option 'seed'"),
    ],
)
def test_registry_refuses_with_the_reason(
    shapes: Registry[_Shape], name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(CodecError) as refused:
        shapes.build(name, options, seed=0)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_registry_refuses_a_second_entry_of_one_name(shapes: Registry[_Shape]) -> None:
    with pytest.raises(CodecError, match="registered already"):
        shapes.register("polygon")(_Shape)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own of 64 KB."""
    with small_disk(tmp_path, "64k"):
        yield tmp_path


def test_a_full_disk_is_told_with_the_file_and_leaves_the_old_one(disk: Path) -> None:
    path = disk / "values.json"
    write_json_atomically(path, {"a": 1})
    with pytest.raises(DiskFullError) as refused:
        write_bytes_atomically(path, bytes(1 << 20))
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert read_json(path) == {"a": 1}
    assert [each.name for each in disk.iterdir()] == ["values.json"]
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)  # noqa: S301


def test_a_limit_on_the_size_of_files_is_told_alike(tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom codec_dist.utils import write_bytes_atomically\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_bytes_atomically(Path(sys.argv[1]), bytes(2000))"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "file")], capture_output=True, text=True)
    assert "DiskFullError" in ended.stderr.splitlines()[-1]
    assert str(tmp_path / "file") in ended.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (ValueError("something else"), False),
    ],
)
def test_full_disks_are_told_from_other_errors(error: Exception, full: bool) -> None:
    assert (full_disk(error) is not None) == full
    wrapped = RuntimeError("while saving")
    wrapped.__cause__ = error
    assert (full_disk(wrapped) is not None) == full
    with pytest.raises(DiskFullError if full else type(error)), naming_full_disk("somewhere"):
        raise error
