"""Which items were packed already, 16 bytes each: of a grown source only the growth is packed."""

import base64
from collections.abc import Iterable
from typing import Literal

import numpy as np
import numpy.typing as npt
import xxhash

from orchestrator.data.formats.base import File, Item, encode_id

_Pairs = npt.NDArray[np.uint64]


class Known:
    """Hashes of items' ids, sorted, and of their stamps; remembers which were seen again."""

    def __init__(self, pairs: _Pairs) -> None:
        self._pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
        self._seen = np.zeros(len(pairs), dtype=np.bool_)
        self._new = set[int]()
        self.changed = 0
        """Items whose stamp is another one now."""

    @classmethod
    def of(cls, items: Iterable[Item]) -> "Known":
        """Return the items of a unit."""
        pairs = [(_hash(item.id), _hash(item.stamp)) for item in items]
        return cls(np.array(pairs, dtype=np.uint64).reshape(-1, 2))

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> "Known":
        """Return the items of all units whose `to_text` is given."""
        content = b"".join(base64.b64decode(text) for text in texts)
        return cls(np.frombuffer(content, dtype="<u8").astype(np.uint64).reshape(-1, 2))

    def to_text(self) -> str:
        """Return the items for a marker."""
        return base64.b64encode(self._pairs.astype("<u8").tobytes()).decode()

    def __len__(self) -> int:
        return len(self._pairs)

    def meet(self, item: Item) -> Literal["new", "kept", "changed", "repeated"]:
        """Return what an item that was listed is, and remember it."""
        key = _hash(item.id)
        start = int(np.searchsorted(self._pairs[:, 0], np.uint64(key)))
        stop = int(np.searchsorted(self._pairs[:, 0], np.uint64(key), side="right"))
        if start == stop:
            return self._meet_new(item, key)
        if self._seen[start]:
            return "repeated"
        self._seen[start:stop] = True
        if np.uint64(_hash(item.stamp)) not in self._pairs[start:stop, 1]:
            self.changed += 1
            return "changed"
        return "kept"

    def _meet_new(self, item: Item, key: int) -> Literal["new", "repeated"]:
        if isinstance(item, File):  # paths do not repeat, so they need no memory
            return "new"
        if key in self._new:
            return "repeated"
        self._new.add(key)
        return "new"

    @property
    def gone(self) -> int:
        """Return how many items were not met."""
        return int(len(self._pairs) - self._seen.sum())


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(encode_id(text))
