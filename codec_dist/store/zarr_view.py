"""A store's files as Zarr reads them, for chunks that only Zarr can decode."""

import asyncio
from collections.abc import AsyncIterator, Iterable

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from codec_dist.store.storage import Place


class ZarrView(Store):
    """A folder of a place as a read-only Zarr store."""

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, place: Place, folder: str) -> None:
        super().__init__(read_only=True)
        self._place, self._folder = place, folder

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ZarrView) and str(self) == str(other)

    def __str__(self) -> str:
        return f"{self._place}/{self._folder}"

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        start, stop = _limits(byte_range)
        try:
            content = await asyncio.to_thread(self._place.read, f"{self._folder}/{key}", start, stop)
        except FileNotFoundError:
            return None
        return (prototype or default_buffer_prototype()).buffer.from_bytes(content)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, limits) for key, limits in key_ranges)))

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self._place.size, f"{self._folder}/{key}") is not None

    async def set(self, key: str, value: Buffer) -> None:
        raise PermissionError(f"{self} is opened for reading")

    async def delete(self, key: str) -> None:
        raise PermissionError(f"{self} is opened for reading")

    async def list(self) -> AsyncIterator[str]:
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        folder = f"{self._folder}/{prefix}".rstrip("/")
        for name in await asyncio.to_thread(self._place.files, folder):
            yield name.removeprefix(f"{self._folder}/")

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        below = f"{prefix}/" if prefix and not prefix.endswith("/") else prefix
        seen = set()
        async for key in self.list_prefix(prefix):
            first = key.removeprefix(below).partition("/")[0]
            if first not in seen:
                seen.add(first)
                yield first


def _limits(byte_range: ByteRequest | None) -> tuple[int, int | None]:
    if isinstance(byte_range, RangeByteRequest):
        return byte_range.start, byte_range.end
    if isinstance(byte_range, OffsetByteRequest):
        return byte_range.offset, None
    if isinstance(byte_range, SuffixByteRequest):
        return -byte_range.suffix, None
    return 0, None
