"""`data.index` or `data.mix` -> one index as a run sees it, and the order of its samples.

Pure but for storage. Every process reads `INDEX.json` of each component; only the process that
plans opens the tables of shards.
"""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from orchestrator.config import DataConfig, UserError
from orchestrator.data import mix
from orchestrator.data.index import Index, Split, read_chunks, read_index, verify
from orchestrator.data.places import ChunkRef, Chunks
from orchestrator.data.stream import Ints, Order, Stream


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """An order of samples and where they lie: only the process that plans read tasks holds one."""

    order: Order
    chunks: tuple[Chunks, ...]
    """Of each component, in the order in which the chunks are numbered."""

    def locate(self, chunks: Ints) -> list[ChunkRef]:
        """Return where each of the chunk numbers, shape (n,), lies."""
        ends = np.cumsum([part.sizes.num_chunks for part in self.chunks])
        parts = np.searchsorted(ends, chunks, side="right")
        refs: dict[int, ChunkRef] = {}
        for number in np.unique(parts).tolist():
            of_part = np.flatnonzero(parts == number)
            first = int(ends[number]) - self.chunks[number].sizes.num_chunks
            found = self.chunks[number].locate(chunks[of_part] - first)
            refs.update(zip(of_part.tolist(), found, strict=True))
        return [refs[i] for i in range(len(chunks))]


def read_data(data: DataConfig) -> Index:
    """Return the index of a run, or of a mix all components as one.

    Raises:
        UserError: the components do not fit together, or one is no packed data set.
    """
    parts = _read_parts(data)
    return parts[0] if not data.mix else _merge(parts, _weights(data, parts, "train"))


def verify_data(data: DataConfig) -> None:
    """Check that the shards, of every component, are those that were indexed.

    Raises:
        UserError: they are not.
    """
    for part in _read_parts(data):
        verify(part)


def open_source(data: DataConfig, split: str, *, seed: int, shuffle: bool) -> Source:
    """Return the order of a split's samples: for training shuffled and mixed by weight.

    Raises:
        UserError: there is no such split, or a table is not the one it was written with.
    """
    parts = [part for part in _read_parts(data) if split in part.splits or not data.mix]
    if not parts:
        raise UserError(f"no index of data.mix has a split {split!r}; pack one with it.")
    chunks = tuple(read_chunks(part, split) for part in parts)
    if data.mix and shuffle:
        return Source(_mixed(data, parts, chunks, split, seed), chunks)
    orders = [
        Stream(
            part.sizes,
            digest=index.digest,
            seed=seed,
            window_chunks=data.window_chunks,
            shuffle=shuffle,
        )
        for index, part in zip(parts, chunks, strict=True)
    ]
    if len(orders) == 1:
        return Source(orders[0], chunks)
    num_chunks = [part.sizes.num_chunks for part in chunks]
    digest = mix.digest_of([index.digest for index in parts], [Fraction(1)] * len(parts))
    return Source(mix.Concatenation(orders, num_chunks=num_chunks, digest=digest), chunks)


def _mixed(
    data: DataConfig, parts: Sequence[Index], chunks: Sequence[Chunks], split: str, seed: int
) -> mix.MixedStream:
    weights = _weights(data, parts, split)
    return mix.MixedStream(
        [part.sizes for part in chunks],
        weights=weights,
        digest=mix.digest_of([part.digest for part in parts], weights),
        seed=seed,
        window_chunks=data.window_chunks,
    )


def _read_parts(data: DataConfig) -> list[Index]:
    if not data.mix:
        return [read_index(data.index)]
    if data.index:
        raise UserError(
            f"data.index={data.index!r} and data.mix are both set but a run reads one or the "
            "other; add the index to data.mix, or leave one of the two out."
        )
    parts = [read_index(part.index) for part in data.mix]
    for part in parts[1:]:
        _check_alike(parts[0], part)
    return parts


def _check_alike(first: Index, other: Index) -> None:
    """Refuse a component whose labels or columns mean something else than the first one's."""
    for name, ours, theirs in (
        ("labels", first.label_kind, other.label_kind),
        ("columns", first.columns, other.columns),
        ("number of classes", len(first.classes), len(other.classes)),
    ):
        if ours != theirs:
            raise UserError(
                f"data.mix: {other.uri} has {name} {theirs!r} but {first.uri} has {ours!r}, and "
                "what is mixed must be alike; pack one of them again to match."
            )
    for label, names in enumerate(zip(first.classes, other.classes, strict=True)):
        if names[0] != names[1]:
            raise UserError(
                f"data.mix: label {label} is {names[1]!r} in {other.uri} but {names[0]!r} in "
                f"{first.uri}, and classes must be the same in the same order; pack one again."
            )


def _weights(data: DataConfig, parts: Sequence[Index], split: str) -> tuple[Fraction, ...]:
    given = [part.weight for part in data.mix]
    for weight in given:
        if weight is not None and not 0 < weight < float("inf"):
            raise UserError(
                f"data.mix: weight must be a number above 0, but it is {weight}; leave an index "
                "out that shall not be used."
            )
    if None in given and any(weight is not None for weight in given):
        raise UserError(
            "data.mix: some indexes have a weight and some have none; give all of them one, or "
            "none, to mix in proportion to their sizes."
        )
    lacking = next((part.uri for part in parts if split not in part.splits), None)
    if lacking is not None or len(parts) != len(given):
        raise UserError(
            f"data.mix: {lacking or 'one of the indexes'} has no {split} images, so it cannot have "
            "a share of them; pack it with smaller fractions or leave it out."
        )
    return mix.shares(given, [part.splits[split].samples for part in parts])


def _merge(parts: Sequence[Index], weights: Sequence[Fraction]) -> Index:
    """Return several indexes as one: the sum of what they hold."""
    names = sorted({name for part in parts for name in part.splits})
    samples = sum(part.splits["train"].samples for part in parts)
    counts = np.zeros(len(parts[0].classes))
    for part, weight in zip(parts, weights, strict=True):
        share = samples * float(weight) / part.splits["train"].samples
        counts += share * np.array(part.class_samples or [0] * len(counts))
    counted = all(part.class_samples for part in parts)
    return dataclasses.replace(
        parts[0],
        uri=" + ".join(part.uri for part in parts),
        digest=mix.digest_of([part.digest for part in parts], weights),
        splits={name: _sum([p.splits[name] for p in parts if name in p.splits]) for name in names},
        settings={},
        quarantined=sum(part.quarantined for part in parts),
        table="",
        class_samples=tuple(max(round(n), n > 0) for n in counts.tolist()) if counted else (),
    )


def _sum(splits: Sequence[Split]) -> Split:
    return Split(*(sum(values) for values in zip(*map(dataclasses.astuple, splits), strict=True)))
