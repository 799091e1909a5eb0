"""What one lister of a pack does: items -> units of what is new, results of what was packed before.

Needs no Ray. Every pack of a grown source is a *generation*; the markers of earlier ones say which
items are in the shards already.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from orchestrator import storage
from orchestrator.data.formats import base
from orchestrator.data.formats.base import Bad, Format, Unit, encode_id
from orchestrator.data.packing.known import Known
from orchestrator.data.packing.shard import MAX_NAMED_BAD, UnitResult, marker_uri, read_marker
from orchestrator.data.stream import hash_key

_READ_THREADS = 16


@dataclasses.dataclass(frozen=True)
class Listed:
    """What a lister found besides new items."""

    kept: int
    changed: int
    gone: int


@dataclasses.dataclass(frozen=True)
class Lister:
    """One part of the source, and the generation that packs it."""

    source: Format
    part: int
    out: str
    generation: int
    max_images: int

    def run(self) -> Iterator[UnitResult | Unit | Listed]:
        """Yield what earlier generations packed, then new units, then the totals.

        Raises:
            UserError: something in the source may not be packed.
        """
        numbers = self._markers()
        texts = list[str]()
        for result in self._earlier(numbers):
            texts.append(result.known)
            yield dataclasses.replace(result, known="")
        known = Known.from_texts(texts)
        repeated = list[Bad]()
        new = self._new(known, repeated)
        count = 0
        mixed = _mixed(new, self.source.mixes * self.max_images)
        for items in _cut(mixed, self.max_images):
            yield Unit(self._name(self.generation, count), tuple(items))
            count += 1
        if repeated:
            yield _left_out(repeated)
        for number in (n for g, n in numbers if g == self.generation and n >= count):
            # Of an interrupted run that saw another source: later packs would take it for packed.
            storage.delete_file(marker_uri(self.out, self._name(self.generation, number)))
        yield Listed(len(known) - known.changed - known.gone, known.changed, known.gone)

    def _new(self, known: Known, repeated: list[Bad]) -> Iterator[Any]:
        for item in self.source.items(self.part):
            met = known.meet(item)
            if met == "new":
                yield item
            elif met == "repeated" and len(repeated) < MAX_NAMED_BAD:
                reason = "duplicate: an earlier item has the same id"
                repeated.append(Bad.of(getattr(item, "uri", item.id), item.id, reason))

    def _name(self, generation: int, number: int) -> str:
        return f"{self.part:05d}/{generation:04d}-{number:06d}"

    def _markers(self) -> list[tuple[int, int]]:
        folder = storage.join(self.out, "units", f"{self.part:05d}")
        names = (entry.name for entry in storage.list_folder(folder))
        found = (name.removesuffix(".json").split("-") for name in names if name.endswith(".json"))
        return [(int(g), int(n)) for g, n in found if g.isdigit() and n.isdigit()]

    def _earlier(self, numbers: list[tuple[int, int]]) -> Iterator[UnitResult]:
        names = [self._name(g, n) for g, n in sorted(numbers) if g < self.generation]
        uris = [marker_uri(self.out, name) for name in names]
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            for uri, result in zip(uris, pool.map(read_marker, uris), strict=True):
                if result is None:
                    raise storage.StorageError(
                        f"{uri} is damaged, so what was packed before is not known; pack into "
                        "another --out."
                    )
                yield result


def _left_out(bad: list[Bad]) -> UnitResult:
    return UnitResult(
        digest="", shards=(), bad=tuple(bad), images_of_label={}, train_of_label={}, known=""
    )


def _mixed(items: Iterable[Any], window: int) -> Iterator[Any]:
    """Yield items shuffled by their ids, a window of them at a time; 0: as they come."""
    if not window:
        yield from items
        return
    batch = list[Any]()
    for item in items:
        batch.append(item)
        if len(batch) == window:
            yield from _shuffled(batch)
            batch = []
    yield from _shuffled(batch)


def _shuffled(items: list[Any]) -> list[Any]:
    return sorted(items, key=lambda item: (hash_key("unit", encode_id(item.id)), item.id))


def _cut(items: Iterable[Any], max_images: int) -> Iterator[list[Any]]:
    batch, batch_bytes = list[Any](), 0
    for item in items:
        if batch and (len(batch) == max_images or batch_bytes + item.size > base.UNIT_BYTES):
            yield batch
            batch, batch_bytes = [], 0
        batch.append(item)
        batch_bytes += min(item.size, base.UNIT_BYTES)
    if batch:
        yield batch
