"""The little that every package shares: errors, hashes, atomic files, names, registries, progress, seeds, memory.

Standard library only (tqdm and Arrow are imported where they are used), so that the numerical packages stay light.
"""

from codec_dist.utils.credentials import values_without_credentials, without_credentials
from codec_dist.utils.environment import environment
from codec_dist.utils.errors import CodecError
from codec_dist.utils.files import (
    DiskFullError,
    absolute_location,
    full_disk,
    naming_full_disk,
    read_json,
    write_atomically,
    write_bytes_atomically,
    write_json_atomically,
)
from codec_dist.utils.hashing import derive_seed, hash_file, hash_json
from codec_dist.utils.memory import available_memory, keep_freed_memory, kernel_memory_kills, tells_of_failed_allocation
from codec_dist.utils.names import escape_name, identifier, nearest_names, suggestion, unescape_name
from codec_dist.utils.progress import Progress
from codec_dist.utils.registry import Registry
from codec_dist.utils.tables import read_tables

__all__ = [
    "CodecError",
    "DiskFullError",
    "Progress",
    "Registry",
    "absolute_location",
    "available_memory",
    "derive_seed",
    "environment",
    "escape_name",
    "full_disk",
    "hash_file",
    "hash_json",
    "identifier",
    "keep_freed_memory",
    "kernel_memory_kills",
    "naming_full_disk",
    "nearest_names",
    "read_json",
    "read_tables",
    "suggestion",
    "tells_of_failed_allocation",
    "unescape_name",
    "values_without_credentials",
    "without_credentials",
    "write_atomically",
    "write_bytes_atomically",
    "write_json_atomically",
]
