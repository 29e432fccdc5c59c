"""Encoded images of every kind: decoded as torchvision's loader does, or refused with a reason, never half."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets.folder import pil_loader

from codec_dist.shards import load_index, read_shard
from codec_dist.shards.shard_reading import LARGEST_IMAGE, decode_image

RANDOM = np.random.default_rng(5)
WIDTH, HEIGHT = 36, 28
RAMP = np.add.outer(np.arange(HEIGHT) * 5, np.arange(WIDTH) * 3)[..., None] * np.array([1, 2, 3]) % 256
PIXELS = np.where(np.arange(HEIGHT)[:, None, None] < 9, RANDOM.integers(0, 256, (HEIGHT, WIDTH, 3)), RAMP)
PIXELS = PIXELS.astype(np.uint8)
ALPHA = np.add.outer(np.arange(HEIGHT) * 9, np.arange(WIDTH)).astype(np.uint8)
DEEP = (np.add.outer(np.arange(HEIGHT) * 40, np.arange(WIDTH))).astype(np.uint16)  # 0 to 1115


def encode(form, mode="RGB", image=None, **options):
    content = io.BytesIO()
    image = Image.fromarray(PIXELS) if image is None else image
    image.convert(mode).save(content, format=form, **options)
    return content.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_by_hand(width, height, depth, colour, rows):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def with_alpha(mode):
    image = Image.fromarray(PIXELS).convert(mode.removesuffix("A"))
    image.putalpha(Image.fromarray(ALPHA))
    return image


def palette():
    return Image.fromarray(PIXELS).quantize(64)


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    return encode("JPEG", exif=exif)


def adobe_ycck():
    # The transform in Adobe's marker: 0 is CMYK, 2 is YCCK; the same numbers then mean other colours.
    content = encode("JPEG", "CMYK")
    place = content.index(b"Adobe") + 11
    assert content[place] == 0
    return content[:place] + b"\x02" + content[place + 1 :]


def deep_colours():
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in PIXELS.astype(np.uint16) * 257)
    return png_by_hand(WIDTH, HEIGHT, 16, 2, rows)


CASES = {
    "jpeg": lambda: encode("JPEG"),
    "jpeg progressive": lambda: encode("JPEG", progressive=True),
    "jpeg grey": lambda: encode("JPEG", "L"),
    "jpeg cmyk": lambda: encode("JPEG", "CMYK"),
    "jpeg ycck": adobe_ycck,
    "jpeg rotated by exif": rotated,
    "png": lambda: encode("PNG"),
    "png grey": lambda: encode("PNG", "L"),
    "png of one bit": lambda: encode("PNG", "1"),
    "png palette": lambda: encode("PNG", "P", palette()),
    "png palette transparent": lambda: encode("PNG", "P", palette(), transparency=bytes([0, 120, 255] * 20)),
    "png palette one transparent": lambda: encode("PNG", "P", palette(), transparency=3),
    "png transparent colour": lambda: encode("PNG", transparency=(1, 2, 3)),
    "png alpha": lambda: encode("PNG", "RGBA", with_alpha("RGBA")),
    "png grey alpha": lambda: encode("PNG", "LA", with_alpha("LA")),
    "png 16 bit": lambda: encode("PNG", "I;16", Image.fromarray(DEEP)),
    "png 16 bit colours": deep_colours,
    "png interlaced": lambda: encode("PNG", interlace=1),
    "webp": lambda: encode("WEBP"),
    "webp lossless": lambda: encode("WEBP", lossless=True),
    "webp alpha": lambda: encode("WEBP", "RGBA", with_alpha("RGBA")),
    "webp animated": lambda: encode("WEBP", save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))]),
    "bmp": lambda: encode("BMP"),
    "gif": lambda: encode("GIF", "P", palette()),
    "tiff": lambda: encode("TIFF"),
    "tiff compressed": lambda: encode("TIFF", compression="tiff_lzw"),
    "ppm": lambda: encode("PPM"),
}


def decoded(content):
    image, problem = decode_image(content)
    assert problem is None
    return image


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_pixels_are_those_of_torchvisions_loader(case, tmp_path):
    content = CASES[case]()
    (tmp_path / "image").write_bytes(content)
    ours = decoded(content).convert("RGB")
    assert ours.size == (WIDTH, HEIGHT)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(pil_loader(tmp_path / "image")))


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("png", PIXELS),
        ("png interlaced", PIXELS),
        ("png transparent colour", PIXELS),
        ("png alpha", PIXELS),
        ("png 16 bit colours", PIXELS),
        ("webp lossless", PIXELS),
        ("bmp", PIXELS),
        ("tiff compressed", PIXELS),
        ("ppm", PIXELS),
        ("png 16 bit", np.repeat(np.minimum(DEEP, 255)[..., None], 3, 2)),
    ],
)
def test_lossless_images_have_the_pixels_that_were_encoded(case, expected):
    """Alpha is dropped; deep colours lose their lower byte; deep grey is clipped."""
    np.testing.assert_array_equal(np.asarray(decoded(CASES[case]()).convert("RGB")), expected)


def test_cmyk_is_not_inverted():
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    np.testing.assert_allclose(
        np.asarray(decoded(encode("JPEG", "CMYK", red)).convert("RGB"))[8, 8], (254, 0, 0), atol=3
    )


def test_transparent_palettes_keep_their_colours():
    image = palette()
    expected = np.asarray(image.convert("RGB"))
    for case in ("png palette", "png palette one transparent"):
        np.testing.assert_array_equal(np.asarray(decoded(CASES[case]()).convert("RGB")), expected)


def test_exif_rotation_is_not_applied():
    np.testing.assert_array_equal(np.asarray(decoded(rotated())), np.asarray(decoded(encode("JPEG"))))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_an_image_that_is_cut_is_refused_or_has_all_its_pixels(case):
    content = CASES[case]()
    whole = np.asarray(decoded(content).convert("RGB"))
    refused = 0
    for cut in sorted({*range(0, len(content), 41), *range(len(content) - 16, len(content))}):
        image, problem = decode_image(content[:cut])
        if image is None:
            assert "the image cannot be decoded: " in problem
            assert "\n" not in problem
            refused += 1
        else:
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), whole)
    assert refused > len(content) // 41 * 0.8


def bombs():
    side = 20_000
    huge = bytearray(encode("JPEG"))
    frame = huge.index(b"\xff\xc0") + 5
    huge[frame : frame + 4] = struct.pack(">HH", 65_000, 65_000)
    gif = bytearray(encode("GIF", "P", palette()))
    gif[6:10] = struct.pack("<HH", 60_000, 60_000)
    bmp = bytearray(encode("BMP"))
    bmp[18:26] = struct.pack("<ii", 50_000, 50_000)
    return {
        "png": png_by_hand(side, side, 8, 2, b"\0" * 1000),
        "png of one bit": png_by_hand(10**9, 2, 1, 0, b""),
        "png just too large": png_by_hand(9460, 9460, 8, 0, b""),
        "jpeg": bytes(huge),
        "gif": bytes(gif),
        "bmp": bytes(bmp),
        "ppm": b"P6 100000 100000 255\n",
    }


@pytest.mark.parametrize("case", bombs())
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_before_they_go_off(case):
    image, problem = decode_image(bombs()[case])
    assert image is None
    assert "more than the" in problem or "decompression bomb" in problem


def test_the_largest_image_is_decoded():
    width, height = 9459, 9459
    assert width * height <= LARGEST_IMAGE < (width + 1) * (height + 1)
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height)
    content = png_by_hand(width, height, 1, 0, b"")
    content = content[: content.index(b"IDAT") - 4] + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert decoded(content).size == (width, height)


def test_a_text_chunk_that_explodes_is_refused():
    text = chunk(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(80_000_000), 9))
    content = encode("PNG")
    place = content.index(b"IDAT") - 4
    image, problem = decode_image(content[:place] + text + content[place:])
    assert image is None
    assert "too large" in problem


SHORT_OF_MEMORY = """
import resource
import sys
from pathlib import Path
from codec_dist.shards.shard_reading import decode_image

content = Path(sys.argv[1]).read_bytes()
decode_image(content)
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**26, resource.RLIM_INFINITY))
try:
    print("decoded", decode_image(content))
except MemoryError:
    print("no memory")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(decode_image(content)[0].size)
"""


def test_too_little_memory_is_not_the_problem_of_the_image(tmp_path):
    (tmp_path / "large.png").write_bytes(encode("PNG", image=Image.new("RGB", (8000, 6000))))
    command = [sys.executable, "-c", SHORT_OF_MEMORY, str(tmp_path / "large.png")]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert output.splitlines() == ["no memory", "(8000, 6000)"]


def test_faulty_images_in_a_shard_are_counted_one_by_one(tmp_path, tar):
    good = encode("PNG")
    members = [
        ("good.png", good),
        ("bomb.png", bombs()["png"]),
        ("cut.jpg", encode("JPEG")[:-40]),
        ("eps.jpg", b"%!PS"),
    ]
    tar(tmp_path / "x.tar", members)
    (info,) = load_index(tmp_path).shards
    reasons = {item.key: item.error for item in read_shard(tmp_path, info)}
    assert reasons["good"] is None
    assert "decompression bomb" in reasons["bomb"]
    assert "truncated" in reasons["cut"]
    assert "it is not, or not whole, in any of JPEG, PNG," in reasons["eps"]
    again = {item.key: item.error for item in read_shard(tmp_path, info)}
    assert again == reasons, "reasons are part of what a store tells"
