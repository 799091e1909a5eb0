"""What decides the content of a packed data set. Pure."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import xxhash

from orchestrator.config import UserError
from orchestrator.data.formats.base import encode_id


@dataclasses.dataclass(frozen=True)
class PackSettings:
    """What decides the content of the shards; what the source is, `Request` says."""

    source: str
    chunk_rows: int = 64
    """Rows of every row group but a shard's last."""
    unit_images: int = 4096
    """Most images of one shard, and most files of one task."""
    val_fraction: float = 0.1
    test_fraction: float = 0.0
    max_side: int = 0
    """Larger images are made so large in pixels; 0: none is changed."""
    quality: int = 0
    """JPEG quality that every image is encoded with again, where that saves; 0: none is."""
    copy: bool = False
    """Copy Parquet files that could be indexed in place."""
    max_bad_fraction: float = 0.1
    """Share of bad samples above which a pack fails: the labels were taken for something else, or
    the source is lost. Decides no shard's content."""

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UserError: naming the flag.
        """
        for flag, value in (("chunk-rows", self.chunk_rows), ("unit-images", self.unit_images)):
            if value < 1:
                raise UserError(f"--{flag} must be at least 1, but it is {value}; raise it.")
        shares = {"val": self.val_fraction, "test": self.test_fraction}
        for name, share in shares.items():
            if not 0 <= share < 1:
                raise UserError(
                    f"--{name}-fraction must be at least 0 and less than 1, but it is {share}; "
                    "0.1 is usual."
                )
        if sum(shares.values()) >= 1:
            raise UserError(
                f"--val-fraction {self.val_fraction} and --test-fraction {self.test_fraction} "
                "leave nothing to train on; together they must be less than 1."
            )
        if not 0 <= self.quality <= 100:
            raise UserError(f"--quality must be 1 to 100, but it is {self.quality}; 90 is usual.")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(
                f"--max-bad-fraction must be 0 to 1, but it is {self.max_bad_fraction}; 0.1 is "
                "usual."
            )
        if self.max_side < 0:
            raise UserError(
                f"--max-side must be a number of pixels, but it is {self.max_side}; 512 is usual."
            )

    def content(self) -> dict[str, Any]:
        """Return every setting by name that shards depend on."""
        content = dataclasses.asdict(self)
        del content["max_bad_fraction"]
        return content

    def check_same(self, found: Mapping[str, Any], out: str) -> None:
        """Refuse to go on with a data set that was packed otherwise.

        Raises:
            UserError: naming the first setting that differs.
        """
        for key, value in self.content().items():
            if found.get(key) != value:
                raise UserError(
                    f"--out {out} was packed with {key} {found.get(key)!r}, not {value!r}; "
                    "choose another --out, or delete it first."
                )

    def fractions(self) -> dict[str, float]:
        """Return the share of images that each split should get."""
        held_out = {"val": self.val_fraction, "test": self.test_fraction}
        return {"train": 1 - sum(held_out.values()), **held_out}

    def split_of(self, sample_id: str, *, named: Collection[str] = ()) -> str:
        """Return the split of an image: by its id alone, never by order or by other images.

        Args:
            sample_id: its id.
            named: splits that the source itself fills; they get nothing else.
        """
        val = self.val_fraction * ("val" not in named)
        test = self.test_fraction * ("test" not in named)
        place = xxhash.xxh3_64_intdigest(encode_id(sample_id)) / 2**64
        if place < val:
            return "val"
        return "test" if place < val + test else "train"
