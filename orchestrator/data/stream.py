"""Position -> chunks and rows: the order in which samples are trained on. Pure: NumPy only.

The stream is epoch 0's order, then epoch 1's, without a gap. Nothing is stored: chunk order and the
order inside a window are computed from keys, so a resume costs the same at any position and one
integer, the position, is the whole state. Integer hashes are used in place of NumPy's generators,
whose streams may change between releases (NEP 19); the order of a run must not.

Sources: the bijection is a balanced Feistel network with cycle walking (Black and Rogaway, "Ciphers
with Arbitrary Finite Domains", CT-RSA 2002, section 4); the mixer is splitmix64's finaliser
(Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, figure 16).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_FEISTEL_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash_key(*parts: int | str | bytes) -> int:
    """Return 64 bits that depend on every part and on their order (xxh3)."""
    digest = xxhash.xxh3_64()
    for part in parts:
        raw = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.intdigest()


def mix(words: Words) -> Words:
    """Return splitmix64's finaliser of each word: a bijection on 64 bits."""
    with np.errstate(over="ignore"):
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def shuffled(count: int, key: int) -> Ints:
    """Return a permutation of range(count) keyed by `key`: for what fits in memory."""
    with np.errstate(over="ignore"):
        counters = np.uint64(key) + np.arange(count, dtype=np.uint64) * _GOLDEN
    return np.argsort(mix(counters), kind="stable")


@dataclasses.dataclass(frozen=True)
class Permutation:
    """A keyed bijection on range(size) in O(1) memory, with its inverse."""

    size: int
    key: int

    @functools.cached_property
    def _half_bits(self) -> int:
        # The domain 4**h is at least `size`, so every value fits, 2**k + 1 included.
        bits = max(2, (self.size - 1).bit_length())
        return (bits + 1) // 2

    @functools.cached_property
    def _round_keys(self) -> list[np.uint64]:
        return [np.uint64(hash_key(self.key, r)) for r in range(_FEISTEL_ROUNDS)]

    def forward(self, values: Ints) -> Ints:
        """Return where each value goes; int64 array of any shape (n,), all in range(size)."""
        return self._walk(values, self._encrypt)

    def backward(self, values: Ints) -> Ints:
        """Return where each value came from."""
        return self._walk(values, self._decrypt)

    def _walk(self, values: Ints, step: Callable[[Words], Words]) -> Ints:
        out = step(np.asarray(values, dtype=np.int64).astype(np.uint64))
        outside = np.flatnonzero(out >= self.size)
        while outside.size:
            out[outside] = step(out[outside])
            outside = outside[out[outside] >= self.size]
        return out.astype(np.int64)

    def _encrypt(self, words: Words) -> Words:
        half, mask = np.uint64(self._half_bits), np.uint64((1 << self._half_bits) - 1)
        left, right = words >> half, words & mask
        for key in self._round_keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        return (left << half) | right

    def _decrypt(self, words: Words) -> Words:
        half, mask = np.uint64(self._half_bits), np.uint64((1 << self._half_bits) - 1)
        left, right = words >> half, words & mask
        for key in reversed(self._round_keys):
            left, right = right ^ (mix(left ^ key) & mask), left
        return (left << half) | right


@dataclasses.dataclass(frozen=True, eq=False)
class ChunkSizes:
    """Rows of every chunk, in memory proportional to the chunks that differ from the rest.

    Packing gives all chunks of a shard but its last the same size, so `odd` holds at most about
    one chunk a shard: 16 MB at a million shards, whatever the number of images.
    """

    num_chunks: int
    usual_rows: int
    odd_chunks: Ints
    """Numbers of the chunks with another size, ascending, shape (k,)."""
    odd_rows: Ints
    """Their rows, shape (k,)."""

    @classmethod
    def from_rows(cls, rows: npt.ArrayLike) -> "ChunkSizes":
        """Build from the rows of every chunk, shape (num_chunks,), each at least 1."""
        all_rows = np.asarray(rows, dtype=np.int64)
        values, counts = np.unique(all_rows, return_counts=True)
        usual = int(values[np.argmax(counts)])
        odd = np.flatnonzero(all_rows != usual)
        return cls(len(all_rows), usual, odd, all_rows[odd])

    @functools.cached_property
    def num_samples(self) -> int:
        """Samples in all chunks together."""
        usual_chunks = self.num_chunks - len(self.odd_chunks)
        return usual_chunks * self.usual_rows + int(self.odd_rows.sum())

    def rows(self, chunks: Ints) -> Ints:
        """Return the rows of each chunk number in `chunks`, shape (n,)."""
        out = np.full(len(chunks), self.usual_rows, dtype=np.int64)
        if len(self.odd_chunks):
            at = np.minimum(np.searchsorted(self.odd_chunks, chunks), len(self.odd_chunks) - 1)
            is_odd = self.odd_chunks[at] == chunks
            out[is_odd] = self.odd_rows[at[is_odd]]
        return out


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
    """Consecutive positions of the stream whose samples are shuffled together.

    Its samples come in sections, each a run of rows of one chunk.
    """

    start: int
    """Stream position of its first sample."""
    stop: int
    key: int | None
    """Permutes its samples; None leaves them in the order of the sections."""
    chunk: Ints
    """Chunk number of each section, shape (s,)."""
    first_row: Ints
    """First row of that chunk, shape (s,)."""
    rows: Ints
    """How many of its rows, shape (s,); they add up to `stop - start`."""
    epoch: Ints
    """The epoch that keys the augmentation of its samples, shape (s,)."""

    def samples(self, start: int, stop: int) -> tuple[Ints, Ints]:
        """Return the section and the row of each of the positions [start, stop), shape (n,)."""
        return self.locate(self.order()[start - self.start : stop - self.start])

    def order(self) -> Ints:
        """Return, for each position, which of the window's samples it shows, shape (stop - start,).

        Samples are counted through the sections.
        """
        count = self.stop - self.start
        return np.arange(count) if self.key is None else shuffled(count, self.key)

    def locate(self, place: Ints) -> tuple[Ints, Ints]:
        """Return the section and the row of samples that `order` numbers, each shape (n,)."""
        ends = np.cumsum(self.rows)
        section = np.searchsorted(ends, place, side="right")
        return section, self.first_row[section] + place - (ends - self.rows)[section]


class Order(Protocol):
    """An endless order of samples, a pure function of the position."""

    digest: str
    """Identifies what is ordered and how."""
    num_samples: int
    """Positions of one epoch."""
    usual_window: int
    """Positions of a window, but for smaller ones here and there."""

    def window_at(self, position: int) -> Window:
        """Return the window that holds `position`."""
        ...


class Stream:
    """The order of samples of one split of one index: a function of (digest, seed, epoch).

    Args:
        sizes: rows of every chunk.
        digest: the index's digest.
        seed: the run's seed.
        window_chunks: consecutive chunks of the chunk order that are shuffled together. Every
            window but an epoch's last has this many.
        shuffle: False gives chunks and rows in the order of the index: for evaluation.
    """

    def __init__(
        self, sizes: ChunkSizes, *, digest: str, seed: int, window_chunks: int, shuffle: bool = True
    ) -> None:
        assert sizes.num_samples > 0
        assert window_chunks > 0
        self.digest = digest
        self.num_samples = sizes.num_samples
        self.usual_window = sizes.usual_rows * window_chunks
        self._sizes = sizes
        self._window_chunks = window_chunks
        self._shuffle = shuffle
        self._key = (digest, seed)
        self._orders: dict[int, ChunkOrder] = {}

    def window_at(self, position: int) -> Window:
        """Return the window that holds `position`."""
        epoch, offset = divmod(position, self.num_samples)
        order = self._order_of_epoch(epoch)
        number = order.slot_at(offset) // self._window_chunks
        first = number * self._window_chunks
        last = min(first + self._window_chunks, self._sizes.num_chunks)
        base = epoch * self.num_samples
        chunks = order.chunks(np.arange(first, last))
        return Window(
            start=base + order.rows_before(first),
            stop=base + order.rows_before(last),
            key=hash_key("window", *self._key, epoch, number) if self._shuffle else None,
            chunk=chunks,
            first_row=np.zeros(len(chunks), dtype=np.int64),
            rows=self._sizes.rows(chunks),
            epoch=np.full(len(chunks), epoch, dtype=np.int64),
        )

    def _order_of_epoch(self, epoch: int) -> "ChunkOrder":
        if epoch not in self._orders:
            key = hash_key("chunks", *self._key, epoch) if self._shuffle else None
            # Positions move forward, so this epoch's order and the last one's are all that is used.
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = ChunkOrder(self._sizes, key)
        return self._orders[epoch]


class ChunkOrder:
    """One epoch's order of chunks: slot -> chunk, and rows before a slot, by arithmetic."""

    def __init__(self, sizes: ChunkSizes, key: int | None) -> None:
        self._sizes = sizes
        self._permutation = None if key is None else Permutation(sizes.num_chunks, key)
        slots = sizes.odd_chunks
        if self._permutation is not None:
            slots = self._permutation.backward(sizes.odd_chunks)
        by_slot = np.argsort(slots, kind="stable")
        self._odd_slots = slots[by_slot]
        excess = sizes.odd_rows[by_slot] - sizes.usual_rows
        # Entry i: how far i odd chunks shift what follows them.
        self._shift = np.concatenate([[0], np.cumsum(excess)]).astype(np.int64)
        self._odd_starts = self._odd_slots * sizes.usual_rows + self._shift[:-1]

    def chunks(self, slots: Ints) -> Ints:
        """Return the chunk in each slot."""
        return slots if self._permutation is None else self._permutation.forward(slots)

    def rows_before(self, slot: int) -> int:
        """Return how many rows the chunks in slots [0, slot) have."""
        odd_before = int(np.searchsorted(self._odd_slots, slot))
        return slot * self._sizes.usual_rows + int(self._shift[odd_before])

    def slot_at(self, offset: int) -> int:
        """Return the slot whose chunk holds row `offset` of the epoch."""
        odd = int(np.searchsorted(self._odd_starts, offset, side="right"))
        if odd:
            slot = int(self._odd_slots[odd - 1])
            if offset < self.rows_before(slot + 1):
                return slot
        return int((offset - self._shift[odd]) // self._sizes.usual_rows)
