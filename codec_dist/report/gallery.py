"""The gallery of modes: pictures beside their maps, the class that a mode correlates with, and its top channels."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codec_dist.report.errors import ReportError
from codec_dist.report.run_data import Row, RunData
from codec_dist.sae import SparseAutoencoder

LARGEST_PNG = 24 * 1024
QUALITY = 82
TOP_CHANNELS = 6
SHOWN_CLASSES = 20


@dataclass(frozen=True)
class Picture:
    """An image beside its mode map."""

    source: str
    """Data URI."""
    width: int
    height: int
    class_name: str
    key: str
    loading: float

    @property
    def description(self) -> str:
        return f"Image {self.key} ({self.class_name}) beside its mode map; loading {self.loading:.3g}"


@dataclass(frozen=True)
class ModeCard:
    """One mode."""

    mode: int
    statistics: Row
    """Its row of modes.parquet; empty where there is none."""
    top_class: str
    map_class: str | None
    """Class that the maps explain."""
    channels: Sequence[tuple[int, float]]
    """Top channels and their weights, relative to the largest."""
    pictures: Sequence[Picture]
    unstable: bool = False
    """Whether SAEs of other seeds do not find it again."""


@dataclass(frozen=True)
class ModeGroup:
    """The modes of one quantity at one layer."""

    quantity: str
    kind: str
    cards: Sequence[ModeCard]
    classes: Sequence[tuple[str, Row]]
    """Classes with their best mode's row of classes.parquet, most correlated first."""
    unstable: frozenset[int]
    """Modes that SAEs of other seeds do not find again."""
    classes_left_out: int

    @property
    def has_pictures(self) -> bool:
        """Whether any of its modes was drawn."""
        return any(card.pictures for card in self.cards)


@dataclass(frozen=True)
class LayerGallery:
    """A tab of the gallery."""

    layer: str
    groups: Sequence[ModeGroup]


def galleries(data: RunData, modes: int, unstable_below: float) -> list[LayerGallery]:
    """Top modes of every layer, at most ``modes`` of each quantity; unstable ones are marked."""
    found = []
    for layer in data.layers:
        rows = [row for row in data.modes if row["layer"] == layer and row["unit"] == "mode"]
        groups = [
            _group(data, layer, quantity, [row for row in rows if row["quantity"] == quantity], modes, unstable_below)
            for quantity in sorted({row["quantity"] for row in rows}, key=lambda name: (name[:1] != "c", name))
        ]
        if groups:
            found.append(LayerGallery(layer, groups))
    return found


def _group(
    data: RunData, layer: str, quantity: str, rows: Sequence[Row], count: int, unstable_below: float
) -> ModeGroup:
    entries = [entry for entry in data.maps if (entry["layer"], entry["quantity"]) == (layer, quantity)]
    drawn = list(dict.fromkeys(entry["mode"] for entry in entries))
    best = sorted(rows, key=lambda row: -2.0 if row["top_correlation"] is None else row["top_correlation"])
    ranked = [row["mode"] for row in reversed(best) if row["alive"]]
    selected = (drawn or ranked)[:count]
    by_mode = {row["mode"]: row for row in rows}
    unstable = frozenset(
        row["mode"] for row in rows if (stable := row.get("stability")) is not None and stable < unstable_below
    )
    dictionary = _dictionary(data, layer, quantity)
    cards = [
        _card(
            data,
            mode,
            by_mode.get(mode, {}),
            [entry for entry in entries if entry["mode"] == mode],
            dictionary,
            unstable,
        )
        for mode in selected
    ]
    classes = _classes(data, layer, quantity)
    return ModeGroup(
        quantity, quantity.partition("-")[0], cards, classes[:SHOWN_CLASSES], unstable,
        max(len(classes) - SHOWN_CLASSES, 0),
    )  # fmt: skip


def _card(
    data: RunData, mode: int, row: Row, entries: Sequence[Row], dictionary: Any, unstable: frozenset[int]
) -> ModeCard:
    pictures = [_picture(data, entry) for entry in sorted(entries, key=lambda entry: entry["rank"])]
    channels = []
    if dictionary is not None and mode < len(dictionary):
        weights = dictionary[mode]
        top = weights.argsort(descending=True)[:TOP_CHANNELS].tolist()
        largest = float(weights[top[0]])
        channels = [(index, float(weights[index]) / largest) for index in top if largest > 0 and weights[index] > 0]
    return ModeCard(
        mode=mode,
        statistics=row,
        top_class=data.class_name(row.get("top_class")) if row.get("top_class") is not None else "no class",
        map_class=data.class_name(entries[0]["class"]) if entries else None,
        channels=channels,
        pictures=pictures,
        unstable=mode in unstable,
    )


def _dictionary(data: RunData, layer: str, quantity: str) -> Any:
    """The dictionary [modes, channels] of the selected SAE; None where there is none."""
    sae = data.selected_sae(layer, quantity)
    return SparseAutoencoder.load(sae.folder).dictionary.detach().cpu() if sae else None


def _classes(data: RunData, layer: str, quantity: str) -> list[tuple[str, Row]]:
    rows = [
        row for row in data.classes
        if (row["layer"], row["quantity"], row["unit"]) == (layer, quantity, "mode") and row["correlation"] is not None
    ]  # fmt: skip
    rows.sort(key=lambda row: -row["correlation"])
    return [(data.class_name(row["class"]), row) for row in rows]


def _picture(data: RunData, entry: Row) -> Picture:
    figures = (data.directory / "figures").resolve()
    path = (figures / str(entry["map"])).resolve()
    if not path.is_relative_to(figures):
        raise ReportError(f"{figures / 'maps.json'} names {entry['map']}, which lies outside: run `visualize` again")
    source, width, height = data_uri(path)
    loading = float(entry["loading"])
    return Picture(source, width, height, data.class_name(entry["label"]), str(entry["key"]), loading)


def data_uri(path: Path) -> tuple[str, int, int]:
    """A picture as a data URI with its width and height; large ones are made smaller with WebP.

    Raises:
        ReportError: the file is missing or is not a picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as picture:
            width, height, kind = picture.width, picture.height, "png"
            if picture.format != "PNG":
                raise UnidentifiedImageError(f"it is {picture.format}, not PNG")
            if len(content) > LARGEST_PNG:
                buffer = io.BytesIO()
                picture.convert("RGB").save(buffer, format="WEBP", quality=QUALITY)
                if buffer.tell() < len(content):
                    content, kind = buffer.getvalue(), "webp"
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ReportError(f"cannot read the picture {path} ({reason}): run `codec-dist visualize` again") from error
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}", width, height
