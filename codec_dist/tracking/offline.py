"""The files in which W&B keeps offline runs: LevelDB's log framing around protobuf records.

A file starts with 7 bytes of W&B's own; then, in blocks of 32 KiB, come fragments of a 7-byte header
(checksum, length, kind) and a payload. No fragment crosses a block.
"""

import struct
import time
from collections.abc import Iterator
from pathlib import Path

BLOCK = 32 * 1024
HEADER = 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_payloads(path: Path, start: int = 0) -> Iterator[bytes]:
    """The whole payloads from the block at byte ``start`` on; an unfinished last one is left out."""
    with path.open("rb") as file:
        file.seek(start)
        content = file.read()
    position = HEADER if start == 0 else 0
    fragments: list[bytes] | None = None
    while position + HEADER <= len(content):
        room = BLOCK - position % BLOCK
        _, length, kind = struct.unpack_from("<IHB", content, position)
        if room < HEADER or kind == 0:  # the rest of a block is padding
            position += room
            continue
        payload = content[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if len(payload) < length:
            return
        if kind in (FULL, FIRST):
            fragments = []
        if fragments is not None:  # else: the rest of a payload that began before `start`
            fragments.append(payload)
            if kind in (FULL, LAST):
                yield b"".join(fragments)
                fragments = None


def is_complete(path: Path) -> bool:
    """Whether the last record says that the run has ended, so that nothing is still to be flushed."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from wandb.proto.wandb_internal_pb2 import Record

    if not path.exists():
        return False
    # The closing record is small: it lies in the last two blocks.
    start = max(path.stat().st_size // BLOCK - 1, 0) * BLOCK
    last = None
    for last in read_payloads(path, start):  # noqa: B007 - only the last one counts
        pass
    if last is None:
        return False
    record = Record()
    try:
        record.ParseFromString(last)
    except DecodeError:
        return False
    return bool(record.HasField("exit"))


def wait_until_complete(path: Path, seconds: float) -> bool:
    """Wait until W&B has written a run's last record, at most so long; say whether it has."""
    deadline = time.monotonic() + seconds
    while not (complete := is_complete(path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return complete
