import csv
import hashlib
import io
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from conftest import encode_png
from sources import read_samples

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.formats.manifest import open_manifests
from orchestrator.data.formats.request import Request

ROWS = [{"uri": f"images/{i}.png", "label": i % 3, "id": f"id-{i}"} for i in range(5)]
IMAGES = {row["uri"]: encode_png(i) for i, row in enumerate(ROWS)}


def as_csv(rows, delimiter=","):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


WRITERS = {
    "csv": as_csv,
    "tsv": lambda rows: as_csv(rows, "\t"),
    "jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    "parquet": as_parquet,
}


def write(root, rows, ending="csv", **request):
    for name, image in IMAGES.items():
        storage.write_atomic(f"{root}/{name}", image)
    location = f"{root}/list.{ending}"
    storage.write_atomic(location, WRITERS[ending](rows))
    return open_manifests(location, Request(**request))


@pytest.mark.parametrize("ending", list(WRITERS))
def test_every_kind_of_table(tmp_path, ending):
    samples, bad = read_samples(write(tmp_path, ROWS, ending))
    assert bad == []
    assert {s.id: s.image for s in samples} == {r["id"]: IMAGES[r["uri"]] for r in ROWS}
    assert [s.label for s in samples] == [r["label"] for r in ROWS]
    assert samples[0].uri == f"{tmp_path}/images/0.png"


def test_names_with_commas_quotes_and_newlines_are_data(tmp_path):
    odd = 'a,"b"\n=x.png'
    storage.write_atomic(f"{tmp_path}/{odd}", encode_png(9))
    source = write(tmp_path, [{"uri": odd, "label": "=HYPERLINK(1)"}])
    assert source.survey(source.items(0)).names == {"=HYPERLINK(1)"}
    source = write(tmp_path, [{"uri": odd}])
    assert [s.id for s in read_samples(source)[0]] == [odd]


@pytest.mark.parametrize(
    "uri",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "../secret.png",
        "images/../../secret.png",
        "images/\0.png",
        "s3://other/x.png",
    ],
)
def test_a_row_outside_the_allowed_prefixes_stops_the_pack(tmp_path, uri):
    source = write(tmp_path / "set", [*ROWS, {"uri": uri, "label": 1, "id": "x"}], "jsonl")
    with pytest.raises(UserError, match=r"list\.jsonl row 6 names .* lies outside .*--allow PRE"):
        list(source.items(0))


@pytest.mark.parametrize(
    "uri",
    ["http://169.254.169.254/latest/meta-data", "https://example.com/x.png", "ftp://h/x", "x://y"],
)
def test_the_network_at_large_is_never_read(tmp_path, uri):
    source = write(tmp_path, [{"uri": uri, "label": 1, "id": "x"}])
    with pytest.raises(UserError, match=r"row 1 names .* only s3, gs, az, file and plain paths"):
        list(source.items(0))
    with pytest.raises(UserError, match=r"--allow .* only s3, gs"):
        write(tmp_path, ROWS, allow=(uri,))


def test_prefixes_that_the_user_allows_are_read(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    storage.write_atomic(f"{elsewhere}/x.png", encode_png(7))
    rows = [{"uri": f"file://{elsewhere}/x.png", "label": 1}]
    samples, _ = read_samples(write(tmp_path / "set", rows, allow=(f"{elsewhere}/",)))
    assert samples[0].image == encode_png(7)
    with pytest.raises(UserError, match="lies outside"):
        # A folder that only begins alike is another folder.
        read_samples(write(tmp_path / "set", rows, allow=(str(elsewhere)[:-1],)))


def test_a_link_that_leads_outside_is_not_followed(tmp_path):
    (tmp_path / "secret").write_bytes(encode_png(1))
    source = write(tmp_path / "set", [{"uri": "images/link.png", "label": 1}])
    os.symlink(tmp_path / "secret", tmp_path / "set" / "images" / "link.png")
    _, bad = read_samples(source)
    assert [b.reason.partition(":")[0] for b in bad] == ["outside"]


def test_checksums_of_three_kinds_are_compared(tmp_path):
    image = IMAGES["images/0.png"]
    good = [
        xxhash.xxh3_64_hexdigest(image),
        hashlib.md5(image).hexdigest(),
        f"sha256:{hashlib.sha256(image).hexdigest().upper()}",
    ]
    rows = [{"uri": "images/0.png", "id": c, "checksum": c} for c in [*good, "0" * 64, "zz"]]
    samples, bad = read_samples(write(tmp_path, rows))
    assert [s.id for s in samples] == good
    assert [b.reason.partition(":")[0] for b in bad] == ["checksum", "checksum"]


def test_a_missing_image_is_one_bad_sample(tmp_path):
    rows = [*ROWS, {"uri": "images/gone.png", "label": 1, "id": "x"}]
    samples, bad = read_samples(write(tmp_path, rows))
    assert len(samples) == 5
    assert [(b.id, b.reason.partition(":")[0]) for b in bad] == [("x", "missing")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"uri,label\na.png,1,2\n", "after row 0 .*more than 2 fields"),
        ("x.csv", b"uri,label\n\xff.png,1\n", "after row 0"),
        ("x.csv", b"label\n1\n", r"has no column uri.*only 'label'; name the URIs' column"),
        ("x.csv", b"uri,label\n,1\n", "row 1 has nothing in column 'uri'"),
        ("x.csv", b"uri,label\n", "is a manifest without rows"),
        ("x.jsonl", b'{"uri": "a"}\n[1]\n', "after row 1 .*no JSON object"),
        ("x.jsonl", b'{"uri": "a"}\n{"uri', "after row 1"),
        ("x.jsonl", b'{"uri": "' + b"a" * (2 << 20), "more than 1048576 characters"),
        ("x.csv", b'"' + b"a" * (2 << 20), "after row 0"),
        ("x.csv", b"uri,label\n" + b"," * (2 << 20), "more than 1048576 characters"),
    ],
)
def test_a_damaged_manifest_is_refused_with_the_row(tmp_path, name, content, message):
    storage.write_atomic(f"{tmp_path}/{name}", content)
    with pytest.raises(UserError, match=message) as caught:
        list(open_manifests(f"{tmp_path}/{name}", Request()).items(0))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_damaged_page_of_a_parquet_manifest_is_refused(tmp_path):
    buffer = io.BytesIO()
    rows = [{"uri": f"{i:09d}.png"} for i in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), buffer, compression="zstd", use_dictionary=False)
    content = bytearray(buffer.getvalue())
    start = content.index(bytes.fromhex("28b52ffd"))
    content[start : start + 40] = bytes(40)
    storage.write_atomic(f"{tmp_path}/x.parquet", bytes(content))
    with pytest.raises(UserError, match="after row 0"):
        open_manifests(f"{tmp_path}/x.parquet", Request())


def test_relative_rows_lie_beside_their_own_manifest(tmp_path):
    for name in "ab":
        storage.write_atomic(f"{tmp_path}/{name}/x.png", encode_png(ord(name)))
        storage.write_atomic(f"{tmp_path}/{name}/list.csv", as_csv([{"uri": "x.png", "id": name}]))
    samples, bad = read_samples(open_manifests(str(tmp_path), Request()))
    assert bad == []
    assert {s.id: s.image for s in samples} == {name: encode_png(ord(name)) for name in "ab"}


def test_a_relative_prefix_is_relative_to_where_pack_runs(tmp_path, monkeypatch):
    storage.write_atomic(f"{tmp_path}/elsewhere/x.png", encode_png(7))
    monkeypatch.chdir(tmp_path)
    rows = [{"uri": f"{tmp_path}/elsewhere/x.png", "label": 1}]
    samples, _ = read_samples(write(tmp_path / "set", rows, allow=("elsewhere",)))
    assert samples[0].image == encode_png(7)


@pytest.mark.parametrize("scheme", ["https", "s3"])
def test_secrets_of_a_signed_url_are_not_shown(tmp_path, scheme):
    uri = f"{scheme}://me:hunter2@host/x.png?signature=hunter2#hunter2"
    source = write(tmp_path, [{"uri": uri, "label": 1, "id": "x"}])
    with pytest.raises(UserError, match=rf"row 1 names '{scheme}://host/x.png'") as caught:
        list(source.items(0))
    assert "hunter2" not in str(caught.value)


@pytest.mark.slow
def test_a_manifest_in_a_bucket_names_objects_of_its_folder(s3):
    root = f"{s3.make_bucket('manifests')}/set"
    rows = [{**row, "uri": f"{root}/{row['uri']}"} for row in ROWS[:3]] + ROWS[3:]
    samples, bad = read_samples(write(root, rows))
    assert bad == []
    assert {s.id: s.image for s in samples} == {r["id"]: IMAGES[r["uri"]] for r in ROWS}
    for outside in ("s3://manifests/other.png", "s3://manifests/set/../other.png", "/etc/passwd"):
        with pytest.raises(UserError, match="lies outside"):
            list(write(root, [{"uri": outside, "label": 1}]).items(0))
