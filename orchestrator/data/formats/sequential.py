"""One object read forwards, a block ahead: tars and manifests."""

import io
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from orchestrator import storage

# One request to S3 at a time, one ahead: 4 MiB amortise its 20 ms and two of them fit anywhere.
_BLOCK_BYTES = 4 << 20


class Sequential(io.RawIOBase):
    """A readable stream over one URI; `seek` goes anywhere, forwards is cheap."""

    def __init__(self, uri: str) -> None:
        super().__init__()
        self._uri = uri
        self._file = storage.open_input(uri)
        self._pool = ThreadPoolExecutor(1)
        self._block, self._start = b"", 0  # the bytes at [start, start + len(block))
        self._next: Future[bytes] | None = None
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the offset of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to an absolute offset without reading what lies between."""
        assert whence == io.SEEK_SET
        self._at = offset
        return offset

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # as CPython
        """Fill a part of a buffer; 0 at the end."""
        self._load()
        begin = self._at - self._start
        part = self._block[begin : begin + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)

    def read_exactly(self, size: int) -> bytes:
        """Return `size` bytes, fewer only where the object ends."""
        parts, missing = [], size
        while missing:
            self._load()
            begin = self._at - self._start
            part = self._block[begin : begin + missing]
            if not part:
                break
            parts.append(part)
            self._at += len(part)
            missing -= len(part)
        return b"".join(parts)

    def _load(self) -> None:
        end = self._start + len(self._block)
        if self._start <= self._at < end:
            return
        ahead, self._next = self._next, None
        if self._at == end and ahead is not None:
            self._start, self._block = end, ahead.result()
        else:
            if ahead is not None:
                ahead.result()  # the file has one position
            self._start, self._block = self._at, self._read(self._at)
        if len(self._block) == _BLOCK_BYTES:
            self._next = self._pool.submit(self._read, self._start + _BLOCK_BYTES)

    def _read(self, offset: int) -> bytes:
        with storage.explained(self._uri, "read"):
            self._file.seek(offset)
            content: bytes = self._file.read(_BLOCK_BYTES)
            return content

    def close(self) -> None:
        """End the block on its way and close the object."""
        if not self.closed:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._file.close()
        super().close()

    def __enter__(self) -> "Sequential":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
