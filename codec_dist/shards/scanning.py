"""One tar's entry in the index, by one read of its bytes."""

from collections.abc import Collection
from dataclasses import dataclass, field

import pyarrow as pa

from codec_dist.shards.location import Location
from codec_dist.shards.samples import read_label
from codec_dist.shards.tally import Tally
from codec_dist.shards.tar import HashingStream, RawSample, dotted_fields, repeated_key, stream_samples

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
    problems: tuple[tuple[int, str], ...] = ()
    """Position and reason of samples that cannot be used, as far as only a scan of the whole tar, or the class
    names, tell: keys that occur again, labels without a class."""


@dataclass(frozen=True)
class Findings:
    """What the scan of a tar found besides its samples; counts by reason."""

    passed_over: Tally = field(default_factory=Tally)
    """Members that belong to no sample."""
    unusable: Tally = field(default_factory=Tally)
    """Samples that cannot be used, as far as names and labels tell."""

    def merge(self, other: "Findings") -> None:
        """Add those of another tar."""
        self.passed_over.merge(other.passed_over)
        self.unusable.merge(other.unusable)


def scan_shard(
    place: Location,
    name: str,
    label_field: str,
    classes: int | None = None,
    size: int | None = None,
    image_fields: Collection[str] = (),
) -> tuple[ShardInfo, pa.Table, Findings]:
    """One tar's entry in the index, its table of samples (a bad label counts as none), and what else was found.

    Args:
        place: folder of the tar.
        name: file name of the tar.
        label_field: extension of the member with the label, or ``json:FIELD``.
        classes: number of classes, where the data set names them: labels from this number on are problems.
        size: bytes of the tar, where known.
        image_fields: extensions that hold images; those with dots decide what is one sample.

    Raises:
        DamagedTarError: the tar is cut short or no tar.
        ShardError: it cannot be read.
    """
    rows, passed_over = _Rows(classes, image_fields), Tally()
    with place.open(name, size) as file:
        stream = HashingStream(file)
        wanted, dotted = {label_field.partition(":")[0].lower()}, dotted_fields(image_fields)
        for sample in stream_samples(stream, place.path(name), wanted, dotted, passed_over):
            rows.add(sample, *read_label(sample.members, label_field))
        fingerprint = stream.drain()
    columns = [[name] * len(rows.keys), range(len(rows.keys)), rows.keys, rows.labels]
    arrays = [pa.array(list(column), kind.type) for column, kind in zip(columns, SAMPLES_SCHEMA)]
    table = pa.Table.from_arrays(arrays, schema=SAMPLES_SCHEMA)
    info = ShardInfo(name, len(rows.keys), stream.bytes, fingerprint, tuple(sorted(rows.problems.items())))
    return info, table, Findings(passed_over, rows.unusable(name))


class _Rows:
    """The samples of one tar as they come: keys, labels, and what is wrong with which."""

    def __init__(self, classes: int | None, image_fields: Collection[str]) -> None:
        self._classes, self._image_fields = classes, {each.lower() for each in image_fields}
        self._reasons: dict[int, str] = {}
        self._first: dict[str, int] = {}
        self.keys: list[str] = []
        self.labels: list[int | None] = []
        self.problems: dict[int, str] = {}
        """Position → reason, where only the whole tar, or the class names, tell."""

    def add(self, sample: RawSample, label: int | None, label_problem: str | None) -> None:
        position = len(self.keys)
        self._first.setdefault(sample.key, position)
        self.keys.append(sample.key)
        self.labels.append(label)
        if sample.repeats is not None:
            for each in {position, self._first.get(sample.repeats, position)}:
                self.problems[each] = repeated_key(sample.repeats)
                self._refuse(each, "samples whose key occurs again in their tar")
        elif label is not None and self._classes is not None and label >= self._classes:
            named = f"classes.json names classes 0 to {self._classes - 1}"
            self.problems[position] = f"the label {label} is out of range: {named}"
            self._refuse(position, f"samples whose label is out of range ({named})")
        elif sample.problem is not None:
            self._refuse(position, f"samples of which it holds: {sample.problem}")
        elif label_problem is not None:
            self._refuse(position, "samples whose label is not an integer from 0")
        elif (count := len(self._image_fields.intersection(sample.members))) != 1:
            which = "several images" if count else "no image"
            self._reasons[position] = f"samples with {which} ({', '.join(sorted(self._image_fields))})"

    def unusable(self, name: str) -> Tally:
        """Counts of samples that cannot be used, by reason."""
        tally = Tally()
        for position, reason in sorted(self._reasons.items()):
            tally.add(reason, f"{self.keys[position]} in {name}")
        return tally

    def _refuse(self, position: int, reason: str) -> None:
        self._reasons[position] = reason
        self.labels[position] = None
