import io
import tarfile
import tracemalloc

import pytest
from sources import tar_bytes

from orchestrator.data.formats.sequential import Sequential
from orchestrator.data.formats.tar import BadTar, members

HOSTILE = ("../../etc/passwd.png", "/abs/x.png", "a\nb.png", "C:\\x.png", "-rf.png", "=1+1.png")


def read(tmp_path, content):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    found = []
    with Sequential(str(path)) as stream:
        for member in members(stream, len(content)):
            body = stream.read_exactly(member.size) if member.kind == "file" else b""
            found.append((member.name, member.kind, body))
    return found


def special(kind, name="x.png", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, "/etc/passwd", size
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(records, name="x.png", body=b"", size=None):
    """Return a member whose PAX header has these raw records."""
    extended = tarfile.TarInfo("pax")
    extended.type, extended.size = tarfile.XHDTYPE, len(records)
    info = tarfile.TarInfo(name)
    info.size = len(body) if size is None else size
    padding = b"\0" * (-len(records) % 512)
    head = extended.tobuf(tarfile.USTAR_FORMAT) + records + padding
    return head + info.tobuf(tarfile.USTAR_FORMAT) + body + b"\0" * (-len(body) % 512)


def record(key, value):
    text = b" " + key + b"=" + value + b"\n"
    length = len(text) + 1
    while len(str(length)) + len(text) != length:
        length += 1
    return str(length).encode() + text


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_wrote(tmp_path, kind):
    long = "d" * (90 if kind == tarfile.USTAR_FORMAT else 300)
    files = [("a.png", b"1" * 513), (f"{long}/b.png", b""), ("\u00e9.png", b"3" * 5_000_000)]
    assert read(tmp_path, tar_bytes(files, kind=kind)) == [(n, "file", c) for n, c in files]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_data(tmp_path, name):
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        assert read(tmp_path, tar_bytes([(name, b"x")], kind=kind)) == [(name, "file", b"x")]
    assert [p.name for p in tmp_path.iterdir()] == ["x.tar"]


def test_nul_in_a_name_and_bytes_that_are_no_utf8_are_data(tmp_path):
    content = pax(record(b"path", b"a\0b.png"), body=b"x") + pax(record(b"path", b"\xff.png"))
    assert [name for name, _, _ in read(tmp_path, content)] == ["a\0b.png", "\udcff.png"]


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE],
)
def test_links_and_devices_are_named_and_not_followed(tmp_path, kind):
    content = special(kind, size=0) + tar_bytes([("y.png", b"y")])
    assert read(tmp_path, content) == [("x.png", "other", b""), ("y.png", "file", b"y")]


def test_sparse_members_are_left_out(tmp_path):
    gnu = special(tarfile.GNUTYPE_SPARSE, size=512) + b"\0" * 512
    content = gnu + pax(record(b"GNU.sparse.major", b"1"), body=b"x") + tar_bytes([("y", b"y")])
    assert [kind for _, kind, _ in read(tmp_path, content)] == ["other", "other", "file"]


def test_a_pax_size_is_believed_only_within_the_archive(tmp_path):
    honest = pax(record(b"size", b"3"), body=b"abc", size=0)
    assert read(tmp_path, honest) == [("x.png", "file", b"abc")]
    for lie in (b"99999999999", b"9" * 18, b"-1", b"1e9", b"9" * 5000):
        with pytest.raises(BadTar, match=r"tar_(truncated|damaged)"):
            read(tmp_path, pax(record(b"size", lie), body=b"abc"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pax(b"99 path=x\n"), "a record of the wrong length"),
        (pax(record(b"path", b"x"))[:1024] * 17, "too many extended headers"),
        (pax(b"x" * 40), "a record of the wrong length"),
        (special(tarfile.XHDTYPE, size=1 << 33), "claims 8589934592 bytes"),
        (special(tarfile.GNUTYPE_LONGNAME, size=4096), "ends inside the extended header"),
        (special(tarfile.REGTYPE, size=1 << 20), "ends at 1049088, after the archive"),
        (tar_bytes([("x", b"y")])[:700] + b"\x01" * 1000, "no tar header at byte 1024"),
        (tar_bytes([("x", b"y" * 600)])[:600], "after the archive"),
        (b"short", "ends inside the header at byte 0"),
        (b"\x1f\x8b" + b"z" * 1000, "it is compressed: decompress it"),
    ],
)
def test_a_damaged_archive_is_refused_without_reading_what_it_promises(tmp_path, content, message):
    tracemalloc.start()
    with pytest.raises(BadTar, match=message):
        read(tmp_path, content)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_every_truncation_and_flipped_header_byte_ends_in_members_or_badtar(tmp_path):
    whole = tar_bytes([("a.png", b"1" * 700), ("b" * 150, b"2")], kind=tarfile.GNU_FORMAT)
    for cut in range(0, len(whole), 97):
        try_to_read(tmp_path, whole[:cut])
    for at in range(512):
        changed = bytearray(whole)
        changed[at] ^= 0xFF
        try_to_read(tmp_path, bytes(changed))


def try_to_read(tmp_path, content):
    try:
        found = read(tmp_path, content)
    except BadTar:
        return
    assert all(len(body) <= len(content) for _, _, body in found)


def test_archives_that_were_concatenated_are_read_to_the_end(tmp_path):
    content = tar_bytes([("a", b"1")]) + tar_bytes([("b", b"2")])
    assert [name for name, _, _ in read(tmp_path, content)] == ["a", "b"]


def test_a_hundred_thousand_members(tmp_path):
    info = tarfile.TarInfo("x.cls")
    buffer = io.BytesIO()
    for i in range(100_000):
        info.name = f"{i:08d}.cls"
        buffer.write(info.tobuf(tarfile.USTAR_FORMAT))
    assert len(read(tmp_path, buffer.getvalue())) == 100_000
