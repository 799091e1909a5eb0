"""What is wrong with an image that cannot be shown. Pure."""

from typing import Final

REASONS: Final = (
    "empty",
    "not_an_image",
    "no_pixels",
    "too_many_pixels",
    "too_thin",
    "truncated",
    "damaged",
)
"""What decoding and checking find; those who read the bytes add "checksum", "missing" and so on."""


class BadImage(Exception):
    """An image that cannot be decoded.

    Attributes:
        reason: a code that stays the same between releases: one of `REASONS`, or a caller's.
        detail: one line for a person.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def one_line(error: Exception) -> str:
    """Return a library's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
