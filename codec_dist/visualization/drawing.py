"""Galleries: the images that load highest on a mode, each beside its mode map, as PNG files."""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from codec_dist.utils import escape_name, write_bytes_atomically, write_json_atomically
from codec_dist.visualization.errors import VisualizationError
from codec_dist.visualization.maps import ChannelNumbers, mode_maps
from codec_dist.visualization.rendering import enlarge, render_mask, render_picture, to_bytes

MINIMUM_SIDE = 160
GAP = 4


@dataclass(frozen=True)
class GallerySample:
    """One image of a gallery: where it is found, and how it loads on the mode."""

    shard: str
    key: str
    label: int | None
    loading: float


@dataclass(frozen=True, eq=False)
class ModeGallery:
    """What is drawn for one mode."""

    layer: str
    """Layer key."""
    quantity: str
    """Stored quantity whose SAE has the mode, e.g. ``contribution-positive``."""
    mode: int
    """Row of the dictionary."""
    channels: ChannelNumbers
    """The mode's top channels, which the map follows."""
    target: int
    """Class whose softmax probability the map explains."""
    samples: Sequence[GallerySample]
    """Highest loading first."""
    images: Float[Tensor, "samples colour height width"]
    """The model's (normalised) inputs, in the order of ``samples``."""


def draw_mode_maps(
    directory: Path,
    model: nn.Module,
    galleries: Iterable[ModeGallery],
    *,
    denormalise: Callable[[Tensor], Tensor],
    median_filter: int = 4,
    contrast: float = 7.0,
) -> list[dict[str, Any]]:
    """Draw every image of every gallery with its mode map, and list them in ``maps.json``.

    Files below ``directory``: ``maps/<escaped layer key>/<quantity>/mode-<n>/<rank>.png`` (image beside
    map), ``<rank>-image.png`` (the image alone), and ``maps.json``, written last: a list of {layer, quantity,
    mode, rank, shard, key, label, loading, class, image, map}, in which ``image`` and ``map`` are paths
    relative to ``directory``. Small images are enlarged by repeating pixels.

    Args:
        directory: folder of the figures; made when missing.
        model: the explained model, in eval mode.
        galleries: one at a time is held.
        denormalise: from the model's inputs to values in [0, 1].
        median_filter: width of the median filter in pixels at 224; 0 or 1 for none.
        contrast: factor on the map before it is clipped.

    Returns:
        The entries of ``maps.json``.

    Raises:
        VisualizationError: a gallery that does not fit the model or itself.
    """
    entries: list[dict[str, Any]] = []
    for gallery in galleries:
        entries += _draw_gallery(Path(directory), model, gallery, denormalise, median_filter, contrast)
    write_json_atomically(Path(directory) / "maps.json", entries)
    return entries


def _draw_gallery(
    directory: Path,
    model: nn.Module,
    gallery: ModeGallery,
    denormalise: Callable[[Tensor], Tensor],
    median_filter: int,
    contrast: float,
) -> list[dict[str, Any]]:
    place = f"{gallery.layer}, {gallery.quantity}, mode {gallery.mode}"
    if len(gallery.samples) != len(gallery.images):
        raise VisualizationError(f"{place}: {len(gallery.samples)} samples but {len(gallery.images)} images")
    if not gallery.samples:
        return []
    maps = mode_maps(model, gallery.layer, gallery.images, gallery.channels, gallery.target).net
    shown = denormalise(gallery.images).cpu().double().numpy()
    folder = Path("maps", escape_name(gallery.layer), escape_name(gallery.quantity), f"mode-{gallery.mode}")
    entries = []
    for rank, (sample, image, mode_map) in enumerate(zip(gallery.samples, shown, maps.cpu().double().numpy())):
        mask = render_mask(mode_map, median_filter, contrast)
        left, right = (enlarge(each, MINIMUM_SIDE) for each in (to_bytes(image), render_picture(image, mask)))
        paths = {"image": folder / f"{rank}-image.png", "map": folder / f"{rank}.png"}
        write_bytes_atomically(directory / paths["image"], encode_png(left))
        write_bytes_atomically(directory / paths["map"], encode_png(beside(left, right)))
        entries.append(
            {
                "layer": gallery.layer,
                "quantity": gallery.quantity,
                "mode": int(gallery.mode),
                "rank": rank,
                "shard": sample.shard,
                "key": sample.key,
                "label": None if sample.label is None else int(sample.label),
                "loading": float(sample.loading),
                "class": int(gallery.target),
                **{name: path.as_posix() for name, path in paths.items()},
            }
        )
    return entries


def beside(
    left: UInt8[np.ndarray, "height width colour"], right: UInt8[np.ndarray, "height width colour"]
) -> UInt8[np.ndarray, "height both colour"]:
    """Two pictures of one size with a white gap between them."""
    gap = np.full((left.shape[0], GAP, left.shape[2]), 255, np.uint8)
    return np.concatenate([left, gap, right], axis=1)


def encode_png(picture: UInt8[np.ndarray, "height width colour"]) -> bytes:
    """The bytes of a PNG file, grey for one colour, else RGB."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
