"""What lies in the offline files of W&B, read by other means than those of the package."""

import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record


def records(path: Path) -> Iterator[Record]:
    """An independent reader of W&B's offline files: LevelDB log frames that hold protobuf records."""
    data, position, payload = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if room < 7 or kind == 0:
            position += room
            continue
        payload += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(payload)
            payload = b""
            yield record


def offline_files(run: Path) -> list[Path]:
    return sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
