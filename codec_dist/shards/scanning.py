"""One tar's entry in the index, by one read of its bytes."""

from dataclasses import dataclass

import pyarrow as pa

from codec_dist.shards.labels import read_label
from codec_dist.shards.location import Location
from codec_dist.shards.streams import HashingStream, repeated_key, stream_samples

SAMPLES_SCHEMA = pa.schema(
    [("shard", pa.string()), ("position", pa.int32()), ("key", pa.string()), ("label", pa.int32())]
)


@dataclass(frozen=True)
class ShardInfo:
    """One tar: its file name, number of samples, size, and the SHA-256 of its bytes."""

    name: str
    samples: int
    """Bad ones included."""
    bytes: int
    fingerprint: str
    faults: tuple[tuple[int, str], ...] = ()
    """Position and reason of samples that cannot be used, as far as only a scan of the whole tar, or the class
    names, tell: keys that occur again, labels without a class."""


def scan_shard(
    place: Location, name: str, label_field: str, classes: int | None = None, size: int | None = None
) -> tuple[ShardInfo, pa.Table]:
    """One tar's entry in the index, and its table of samples (a bad label counts as none).

    Args:
        place: folder of the tar.
        name: file name of the tar.
        label_field: extension of the member with the label, or ``json:FIELD``.
        classes: number of classes, where the data set names them: labels from this number on are faults.
        size: bytes of the tar, where known.

    Raises:
        DamagedTarError: the tar is cut short or no tar.
        ShardError: it cannot be read.
    """
    keys: list[str] = []
    labels: list[int | None] = []
    first: dict[str, int] = {}
    faults: dict[int, str] = {}
    with place.open(name, size) as file:
        stream = HashingStream(file)
        for sample in stream_samples(stream, place.path(name), {label_field.partition(":")[0].lower()}):
            position = len(keys)
            label, _ = read_label(sample.members, label_field)
            if sample.repeats is not None:
                faults[position] = faults[first[sample.repeats]] = repeated_key(sample.repeats)
                labels[first[sample.repeats]] = None
            elif label is not None and classes is not None and label >= classes:
                faults[position] = f"the label {label} is out of range: classes.json names classes 0 to {classes - 1}"
            first.setdefault(sample.key, position)
            keys.append(sample.key)
            labels.append(None if sample.fault or position in faults else label)
        fingerprint = stream.drain()
    columns = [[name] * len(keys), range(len(keys)), keys, labels]
    arrays = [pa.array(list(column), kind.type) for column, kind in zip(columns, SAMPLES_SCHEMA)]
    table = pa.Table.from_arrays(arrays, schema=SAMPLES_SCHEMA)
    return ShardInfo(name, len(keys), stream.bytes, fingerprint, tuple(sorted(faults.items()))), table
