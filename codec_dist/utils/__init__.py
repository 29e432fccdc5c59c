"""The little that every room shares: errors, hashes, atomic files, names, registries, progress, seeds.

Standard library only (tqdm is imported when a bar is drawn), so that the numerical rooms stay light.
"""

from codec_dist.utils.errors import CodecError
from codec_dist.utils.files import read_json, write_bytes_atomically, write_json_atomically
from codec_dist.utils.hashing import hash_file, hash_json
from codec_dist.utils.names import escape_name, nearest_names, suggestion, unescape_name
from codec_dist.utils.progress import Progress
from codec_dist.utils.registry import Registry
from codec_dist.utils.seeds import derive_seed

__all__ = [
    "CodecError",
    "Progress",
    "Registry",
    "derive_seed",
    "escape_name",
    "hash_file",
    "hash_json",
    "nearest_names",
    "read_json",
    "suggestion",
    "unescape_name",
    "write_bytes_atomically",
    "write_json_atomically",
]
