"""The members of a tar, read as a stream by offset. Nothing is ever extracted.

A parser of our own and not `tarfile`: names stay data, sizes are checked against the archive before
anything is read, and no header makes it allocate more than 1 MiB.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from orchestrator.data.formats.sequential import Sequential

_BLOCK = 512
# Of a PAX header or a GNU long name.
_MAX_HEADER_BYTES = 1 << 20
# Honest members have at most four: a global one, a PAX one, a long name and a long link.
_MAX_EXTENDED = 16
_GZIP_START = b"\x1f\x8b"
_FILES = (b"0", b"\0", b"7")
_NO_DATA = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "character device",
    b"4": "block device",
    b"5": "folder",
    b"6": "named pipe",
}
_SPARSE = "sparse file"
Kind = Literal["file", "folder", "other"]


class BadTar(Exception):
    """An archive that cannot be read any further."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One entry; the stream stands at its first byte."""

    name: str
    """As stored: not to be used as a path."""
    size: int
    kind: Kind
    what: str = ""
    """What it is, where it is neither a file nor a folder."""


def members(stream: Sequential, size: int) -> Iterator[Member]:
    """Yield the members of an archive of `size` bytes, whatever of each is read.

    Raises:
        BadTar: a header is damaged or promises more bytes than there are.
    """
    at, extended, count = 0, dict[str, str](), 0
    while at < size:
        stream.seek(at)
        header = stream.read_exactly(_BLOCK)
        if len(header) < _BLOCK:
            raise BadTar(f"tar_truncated: it ends inside the header at byte {at}")
        if header.count(0) == _BLOCK:
            at += _BLOCK  # the end, or padding between archives that were concatenated
            continue
        _check_sum(header, at)
        kind, length = header[156:157], _number(header[124:136], at)
        if kind in (b"x", b"g", b"L", b"K"):
            count += 1
            if count > _MAX_EXTENDED:
                raise BadTar(f"tar_damaged: too many extended headers before byte {at}")
            extended |= _extension(stream, kind, _inside(at, length, size))
            at += _BLOCK + _padded(length)
            continue
        length = int(extended.pop("size", length))
        data = at + _BLOCK + _BLOCK * _sparse_headers(stream, header)
        if kind in _NO_DATA:
            length = 0
        end = data + length
        if end > size:
            raise BadTar(f"tar_truncated: the member at byte {at} ends at {end}, after the archive")
        stream.seek(data)
        yield _member(header, kind, length, extended)
        at, extended, count = data + _padded(length), {}, 0


def _inside(at: int, length: int, size: int) -> int:
    if length > _MAX_HEADER_BYTES:
        raise BadTar(f"tar_damaged: the extended header at byte {at} claims {length} bytes")
    if at + _BLOCK + length > size:
        raise BadTar(f"tar_truncated: it ends inside the extended header at byte {at}")
    return length


def _member(header: bytes, kind: bytes, length: int, extended: dict[str, str]) -> Member:
    name = extended.get("path") or _header_name(header)
    sparse = kind == b"S" or _SPARSE in extended
    if kind in _FILES and not sparse:
        return Member(name, length, "folder" if name.endswith("/") else "file")
    if kind == b"5":
        return Member(name, length, "folder")
    what = _SPARSE if sparse else _NO_DATA.get(kind, f"member of type {kind!r}")
    return Member(name, length, "other", what)


def _header_name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    return _text(name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _check_sum(header: bytes, at: int) -> None:
    stated = header[148:156].strip(b" \0")
    try:
        expected = int(stated, 8)
    except ValueError:
        expected = -1
    unsigned = sum(header[:148]) + 8 * 32 + sum(header[156:])
    # Some old writers summed signed bytes.
    high = sum(byte > 127 for byte in header[:148] + header[156:])
    if expected not in (unsigned, unsigned - 256 * high):
        gzip = " (it is compressed: decompress it)" if header.startswith(_GZIP_START) else ""
        raise BadTar(f"tar_damaged: there is no tar header at byte {at}{gzip}")


def _number(field: bytes, at: int) -> int:
    if field[0] & 0x80:  # base 256, where octal digits do not suffice
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
    elif not set(digits := field.strip(b" \0")) - set(b"01234567"):
        return int(digits or b"0", 8)
    raise BadTar(f"tar_damaged: the header at byte {at} has the size {field!r}")


def _padded(length: int) -> int:
    return -(-length // _BLOCK) * _BLOCK


def _sparse_headers(stream: Sequential, header: bytes) -> int:
    """Return how many further header blocks an old GNU sparse member has."""
    count, more = 0, header[156:157] == b"S" and header[482]
    while more:
        block = stream.read_exactly(_BLOCK)
        if len(block) < _BLOCK:
            raise BadTar("tar_truncated: it ends inside a sparse header")
        count, more = count + 1, block[504]
    return count


def _extension(stream: Sequential, kind: bytes, length: int) -> dict[str, str]:
    content = stream.read_exactly(length)
    if kind == b"L":
        return {"path": _text(content.partition(b"\0")[0])}
    if kind in (b"K", b"g"):
        return {}  # a link's target, or defaults for all members: neither is used
    return _pax(content)


def _pax(content: bytes) -> dict[str, str]:
    found, at = dict[str, str](), 0
    while at < len(content):
        digits, _, _ = content[at : at + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = content[at : at + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if len(record) != length or not record.endswith(b"\n") or not equals:
            raise BadTar("tar_damaged: a PAX header has a record of the wrong length")
        if key == b"size" and not (value.isdigit() and len(value) < 20):
            raise BadTar(f"tar_damaged: a PAX header has the size {value[:20]!r}")
        if key in (b"path", b"size"):
            found[_text(key)] = _text(value)
        elif key.startswith(b"GNU.sparse."):
            found[_SPARSE] = ""  # one for all: there may be 100,000 keys
        at += length
    return found
