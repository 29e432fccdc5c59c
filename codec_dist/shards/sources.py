"""Images to pack that are in memory, such as the built-in digits."""

import io
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from codec_dist.shards.samples import Sample


def digits() -> tuple["HeldSamples", list[str]]:
    """Scikit-learn's 1,797 handwritten digits: 8×8 grey PNG, values 0..16 scaled to 0..255; classes "0" to "9"."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    pixels = np.rint(bundle.images * (255 / 16)).astype(np.uint8)
    samples = []
    for number, (image, label) in enumerate(zip(pixels, bundle.target)):
        content = io.BytesIO()
        # Uncompressed, so that the bytes do not depend on the version of zlib.
        Image.fromarray(image).save(content, format="PNG", compress_level=0)
        samples.append(Sample(f"digit-{number:06d}", content.getvalue(), "png", int(label)))
    return HeldSamples(samples), [str(label) for label in bundle.target_names]


class HeldSamples:
    """Samples that are in memory."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)

    def keys(self) -> Iterator[str]:
        return (sample.key for sample in self._samples)

    def read(self, numbers: Sequence[int]) -> list[Sample]:
        return [self._samples[number] for number in numbers]
