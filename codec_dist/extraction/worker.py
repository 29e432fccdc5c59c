"""The actor: reads shards, attributes them, writes their blocks, and returns small receipts."""

import importlib
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from codec_dist.attribution import AttributionResult, Attributor, DataStatistics, NotFiniteError, is_out_of_memory
from codec_dist.cluster_runtime import current_node, record_crashes
from codec_dist.extraction.agreement import Agreement
from codec_dist.extraction.batches import Batch, Dropped, make_batches, prefetched
from codec_dist.extraction.errors import ExtractionError
from codec_dist.extraction.plan import Plan, build_attributor, cause_of, needs_labels, pin_numerics
from codec_dist.models import LoadedModel, load_model, model_line
from codec_dist.shards import ShardInfo, read_shard
from codec_dist.store import BlockWriter, StoreFullError
from codec_dist.utils import CodecError, keep_freed_memory

NOT_FINITE = "its target, gradients or contributions are not finite (NaN or infinity)"


@dataclass(frozen=True)
class ShardTask:
    """One shard for one actor."""

    number: int
    info: ShardInfo
    attempt: int
    turn: int
    """How many shards were given to this actor before."""


@dataclass(frozen=True)
class TimeSplit:
    """Seconds of an actor, of one shard or of many.

    ``decode_wait``, ``compute`` and ``idle`` follow one another and add up to the actor's time; ``write``
    goes on beside them, while the next shard is computed.
    """

    decode_wait: float = 0.0
    """Waited for images to be read, decoded and prepared."""
    compute: float = 0.0
    """Attributed, and gathered the rows."""
    write: float = 0.0
    """Checked and wrote the block."""
    idle: float = 0.0
    """Between two shards: had none, or the last one's block was still being written."""

    def __add__(self, other: "TimeSplit") -> "TimeSplit":
        return TimeSplit(
            self.decode_wait + other.decode_wait,
            self.compute + other.compute,
            self.write + other.write,
            self.idle + other.idle,
        )

    @property
    def wall(self) -> float:
        """The actor's time, without what it wrote meanwhile."""
        return self.decode_wait + self.compute + self.idle

    def fractions(self) -> dict[str, float]:
        """Each kind as a fraction of the actor's time; ``write`` can be in the time of the others."""
        return {kind: seconds / max(self.wall, 1e-9) for kind, seconds in asdict(self).items()}


@dataclass(frozen=True)
class Receipt:
    """A finished shard."""

    number: int
    rows: int
    dropped: tuple[tuple[str, str], ...]
    """Key of each dropped sample, and why."""
    seconds: float
    actor: int
    """Serial number of the actor that did it."""
    times: TimeSplit
    """Where the actor's time went, since its shard before."""
    agreement: Agreement = field(default_factory=Agreement)
    """Labels and predictions, counted."""


@dataclass(frozen=True)
class Failure:
    """Why an actor could not start or a shard could not be done. Plain text: it always travels."""

    reason: str
    broken: bool = False
    """Not an error of the shard that is understood: the actor may be unfit for others, too."""
    full: bool = False
    """There is no space left for the store: no other shard can be done either."""


def crash_file(plan: Plan, serial: int) -> Path:
    """Where an actor leaves the signal that it crashes with, if its node sees the run's folder."""
    return Path(plan.config.run.directory) / f".actor-{serial}.crash"


@dataclass
class Stopwatch:
    """Adds up seconds by kind."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Count the time of a block as ``kind``."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(kind, time.monotonic() - started)

    def add(self, kind: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds

    def split(self) -> TimeSplit:
        """What was counted."""
        return TimeSplit(**self.seconds)


class ShardWorker:
    """Does shards one at a time, and decodes the next one meanwhile.

    Run it as a Ray actor with two threads: while one call computes, the other one's images are decoded and
    prepared (as far as ``data.prefetch`` microbatches), or its block is written.
    """

    def __init__(self, plan: Plan, on_gpu: bool, serial: int) -> None:
        self._plan, self._on_gpu, self._serial = plan, on_gpu, serial
        self._next_turn = 0
        self._ended: set[int] = set()
        self._turns = threading.Condition()
        self._free_since: float | None = None

    def greet(self) -> str:
        """Tell by returning that the actor has its place and runs; on which node, by Ray's name."""
        return current_node()

    def prepare(self) -> Failure | None:
        """Load the model; must be called once, first."""
        try:
            self._load()
        except Exception as error:  # noqa: BLE001  whatever it is, the coordinator decides
            return Failure(_describe(error))
        return None

    def extract(self, task: ShardTask) -> Receipt | Failure:
        """Do one shard."""
        try:
            return self._extract(task)
        except Exception as error:  # noqa: BLE001  whatever it is, the coordinator decides
            # What has run out of memory would do so with other shards, too: a new process begins with less.
            broken = not isinstance(error, CodecError) or is_out_of_memory(error)
            return Failure(_describe(error), broken=broken, full=isinstance(error, StoreFullError))
        finally:
            self._end_turn(task.turn)

    def _load(self) -> None:
        keep_freed_memory()
        record_crashes(crash_file(self._plan, self._serial))
        config = self._plan.config
        device = torch.device("cuda" if self._on_gpu else "cpu")
        pin_numerics(config, device)
        self._model: LoadedModel = load_model(config.model, seed=config.run.seed)
        if self._model.fingerprint != self._plan.model_fingerprint:
            raise ExtractionError(
                f"the model {config.model.spec} is another on this node than on the driver's (weights "
                f"{config.model.weights}): give every node the same file and the same versions"
            )
        self._model.module.to(device)
        statistics = None if self._plan.statistics is None else DataStatistics.load(self._plan.statistics)
        self._attributor: Attributor = build_attributor(
            config,
            self._model,
            microbatch=self._plan.microbatch,
            fractions=self._plan.fractions,
            statistics=statistics,
            optimizations=self._plan.optimizations,
        )
        self._writer = BlockWriter(self._plan.store)
        _import_what_is_imported_late()

    def _extract(self, task: ShardTask) -> Receipt:
        data, dropped = self._plan.config.data, list[Dropped]()
        samples = read_shard(
            self._plan.location,
            task.info,
            image_fields=data.image_fields,
            label_field=data.label_field,
            threads=data.decode_threads,
            classes=self._model.classes,
        )
        batches = make_batches(
            samples,
            self._model.preprocessing,
            self._plan.microbatch,
            dropped.append,
            labelled=needs_labels(self._attributor),
            pin=self._on_gpu,
        )
        watch = Stopwatch()
        with prefetched(batches, data.prefetch) as ahead, self._turn(task.turn, watch):
            rows = ShardRows(self._plan, task.info.samples)
            while True:
                with watch.measure("decode_wait"):
                    batch = next(ahead, None)
                if batch is None:
                    break
                with watch.measure("compute"):
                    for part, result in self._attribute(batch, dropped):
                        rows.append(part, result)
        return self._write(task, rows, dropped, watch)

    def _write(self, task: ShardTask, rows: "ShardRows", dropped: Sequence[Dropped], watch: Stopwatch) -> Receipt:
        named = tuple((each.key, each.reason) for each in sorted(dropped, key=lambda each: each.position))
        seconds = watch.seconds.get("decode_wait", 0.0) + watch.seconds.get("compute", 0.0)
        with watch.measure("write"):
            samples = rows.samples()
            marker = self._writer.write(task.number, rows.values(), samples, named, seconds, task.attempt)
        agreement = Agreement.of(samples)
        return Receipt(task.number, marker.rows, named, seconds, self._serial, watch.split(), agreement)

    @contextmanager
    def _turn(self, turn: int, watch: Stopwatch) -> Iterator[None]:
        """Shards are computed one at a time, in the order in which they were given."""
        with self._turns:
            self._turns.wait_for(lambda: self._next_turn == turn)
        if self._free_since is not None:
            watch.add("idle", time.monotonic() - self._free_since)
        try:
            yield
        finally:
            self._free_since = time.monotonic()
            self._end_turn(turn)

    def _end_turn(self, turn: int) -> None:
        """Let the next shard be computed; nothing happens the second time."""
        with self._turns:
            self._ended.add(turn)
            while self._next_turn in self._ended:
                self._next_turn += 1
            self._turns.notify_all()

    def _attribute(self, batch: Batch, dropped: list[Dropped]) -> Iterator[tuple[Batch, AttributionResult]]:
        """Results of a batch in order: of all of it, or of what is left without samples that are not finite."""
        todo = [batch]
        while todo:
            part = todo.pop(0)
            try:
                result = self._attributor(part.images, part.labels)
            except NotFiniteError as error:
                # The cause is reported for the first only; each of the others may have its own.
                bad = sorted(set(error.samples))
                reasons = [cause_of(error), *[NOT_FINITE] * (len(bad) - 1)]
                dropped += [Dropped(part.positions[i], part.keys[i], reason) for i, reason in zip(bad, reasons)]
                todo[:0] = [part.select(kept)] if (kept := [i for i in range(len(part)) if i not in bad]) else []
            else:
                yield part, result


class ShardRows:
    """The rows of one shard as they come, in one matrix on the host."""

    def __init__(self, plan: Plan, samples: int) -> None:
        self._plan = plan
        further = [
            f"contribution[{target}]-{quantity.rpartition('-')[2]}"
            for target in plan.targets[1:]
            for quantity in plan.quantities
            if quantity.startswith("contribution")
        ]
        quantities = [*plan.quantities, *further]
        widths = [(layer, quantity, width) for layer, width in plan.layers.items() for quantity in quantities]
        total = sum(width for *_, width in widths)
        self._matrix = np.empty((samples, total), np.dtype(plan.config.attribution.dtype))
        self._columns: dict[tuple[str, str], slice] = {}
        start = 0
        for layer, quantity, width in widths:
            self._columns[layer, quantity] = slice(start, start + width)
            start += width
        self._keys: list[str] = []
        self._numbers: dict[str, list[torch.Tensor]] = {}

    def append(self, batch: Batch, result: AttributionResult) -> None:
        """Take in the results of ``batch``; one copy from the device."""
        quantities = {layer: _all_quantities(result, layer) for layer in self._plan.layers}
        block = torch.cat([quantities[layer][quantity] for layer, quantity in self._columns], dim=1)
        self._matrix[len(self._keys) : len(self._keys) + len(batch)] = block.cpu().numpy()
        self._keys += batch.keys
        numbers = {
            "label": batch.labels,
            "prediction": result.prediction,
            "target_value": result.target_value,
            "baseline_value": result.baseline_value,
        }
        if result.steps is not None:
            numbers["path_steps"] = result.steps
        numbers |= _residuals(result, self._plan.complete_layers, "completeness")
        for target, other in result.others.items():
            numbers[f"target_value[{target}]"] = other.target_value
            numbers[f"baseline_value[{target}]"] = other.baseline_value
            numbers |= _residuals(other, self._plan.complete_layers, f"completeness[{target}]")
        for name, values in numbers.items():
            self._numbers.setdefault(name, []).append(values.detach().cpu())

    def values(self) -> dict[tuple[str, str], np.ndarray]:
        """(layer key, quantity) → array [rows, channels]."""
        return {name: self._matrix[: len(self._keys), columns] for name, columns in self._columns.items()}

    def samples(self) -> pa.Table:
        """The table of samples that the store takes."""
        labels = self._column("label", pa.int32()).to_pylist()
        return pa.table(
            {
                "key": pa.array(self._keys, pa.string()),
                "label": pa.array([None if label < 0 else label for label in labels], pa.int32()),
                "prediction": self._column("prediction", pa.int32()),
                "target_value": self._column("target_value", pa.float64()),
                "baseline_value": self._column("baseline_value", pa.float64()),
                **({"path_steps": self._column("path_steps", pa.int32())} if self._plan.refines else {}),
                **{name: self._column(name, pa.float64()) for name in self._names()},
            }
        )

    def _names(self) -> list[str]:
        """Columns beside the plain ones; known also where a shard has no row."""
        layers, targets = self._plan.complete_layers, self._plan.targets[1:]
        first = [f"completeness.{layer}" for layer in layers]
        others = [
            name
            for target in targets
            for name in (
                f"target_value[{target}]",
                f"baseline_value[{target}]",
                *(f"completeness[{target}].{layer}" for layer in layers),
            )
        ]
        return [*first, *others]

    def _column(self, name: str, kind: pa.DataType) -> pa.Array:
        parts = self._numbers.get(name, [])
        return pa.array(torch.cat(parts).numpy() if parts else np.empty(0), type=kind) if parts else pa.array([], kind)


def _all_quantities(result: AttributionResult, layer: str) -> dict[str, torch.Tensor]:
    """Numbers of one layer by the names that the store knows them by, contributions to further targets included."""
    named = dict(result[layer].quantities())
    for target, other in result.others.items():
        named[f"contribution[{target}]-positive"] = other[layer].positive
        named[f"contribution[{target}]-negative"] = other[layer].negative
    return named


def _residuals(result: AttributionResult, layers: Sequence[str], name: str) -> dict[str, torch.Tensor]:
    residuals = {}
    for layer in layers:
        residual = result[layer].completeness
        assert residual is not None
        residuals[f"{name}.{layer}"] = residual
    return residuals


def _import_what_is_imported_late() -> None:
    """Spend these seconds before there is work: the first array that pyarrow makes imports pandas, the first tar
    WebDataset, the first image Pillow's decoders.
    """
    importlib.import_module("webdataset.tariterators")
    pa.array([""], pa.string())
    Image.preinit()


def _describe(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words if isinstance(error, CodecError) else model_line(error) or f"{type(error).__name__}: {words}"
