import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from conftest import write_tree
from s3 import environment

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.index import read_chunks, read_index, read_shards, verify
from orchestrator.data.packing.pack import QUARANTINE_FILE, pack

pytestmark = pytest.mark.slow


def ignore(line: str) -> None:
    """Say nothing."""


def read_rows(index):
    """Return all rows of all shards, with their split."""
    for shard in read_shards(index):
        table = pq.read_table(storage.open_input(storage.join(index.uri, shard.path)))
        for row in table.to_pylist():
            yield shard.split, row


def modified(folder):
    return {str(p): p.stat().st_mtime_ns for p in Path(folder).rglob("*") if p.is_file()}


def test_every_image_is_packed_once_in_the_split_of_its_id(ray_with_s3, make_tree, tmp_path):
    root, files = make_tree(dog=70, cat=50)
    said = []
    index = pack(
        root,
        str(tmp_path / "out"),
        chunk_rows=8,
        unit_images=32,
        val_fraction=0.2,
        test_fraction=0.1,
        say=said.append,
    )
    rows = list(read_rows(index))
    assert len(rows) == 120
    assert {row["id"]: row["image"] for _, row in rows} == files
    assert index == read_index(index.uri)
    assert index.classes == ("cat", "dog")
    assert all(index.classes[r["label"]] == r["id"].partition("/")[0] for _, r in rows)
    assert set(index.splits) == {"train", "val", "test"}
    assert sum(split.samples for split in index.splits.values()) == 120
    assert (
        max(read_chunks(index, "train").sizes.rows(list(range(index.splits["train"].chunks)))) == 8
    )
    assert said[-1].startswith(f"packed {index.uri}: 2 classes; images:")
    verify(index)


def test_packing_twice_changes_nothing_and_says_so(ray_with_s3, make_tree, tmp_path):
    root, _ = make_tree(cat=30)
    out = str(tmp_path / "out")
    first = pack(root, out, say=ignore)
    before, said = modified(out), []
    assert pack(root, out, say=said.append) == first
    assert modified(out) == before
    assert "nothing to do" in said[0]


def test_an_index_of_other_settings_is_not_overwritten(ray_with_s3, make_tree, tmp_path):
    root, _ = make_tree(cat=30)
    out = str(tmp_path / "out")
    pack(root, out, say=ignore)
    before = modified(out)
    with pytest.raises(UserError, match=r"was packed with chunk_rows 64, not 32; choose another"):
        pack(root, out, chunk_rows=32, say=ignore)
    with pytest.raises(UserError, match="was packed with source"):
        pack(str(tmp_path / "elsewhere"), out, say=ignore)
    assert modified(out) == before


@pytest.mark.parametrize("inside", ["", "cat", "shards/of/it"])
def test_an_out_inside_the_source_is_refused(make_tree, inside):
    root, files = make_tree(cat=2)
    with pytest.raises(UserError, match="lies in --source"):
        pack(root, f"{root}/{inside}", say=ignore)
    assert len(modified(root)) == len(files)


def test_an_image_keeps_its_split_when_others_come(ray_with_s3, make_tree, tmp_path):
    root, _ = make_tree(cat=40, dog=40)
    small = pack(root, str(tmp_path / "small"), val_fraction=0.3, say=ignore)
    before = {row["id"]: split for split, row in read_rows(small)}
    write_tree(root, {"ant": 5, "cat": 60, "dog": 40})
    large = pack(root, str(tmp_path / "large"), unit_images=16, val_fraction=0.3, say=ignore)
    after = {row["id"]: split for split, row in read_rows(large)}
    assert len(after) == 105
    assert {name: after[name] for name in before} == before


def test_broken_files_are_quarantined_and_the_rest_is_packed(ray_with_s3, make_tree, tmp_path):
    root, files = make_tree(cat=30)
    Path(root, "cat", "notes.txt").write_text("no image")
    Path(root, "cat", "link.png").symlink_to("nothing")
    said = []
    index = pack(root, str(tmp_path / "out"), say=said.append)
    assert index.quarantined == 2
    assert {row["id"] for _, row in read_rows(index)} == set(files)
    rows = pq.read_table(storage.join(index.uri, QUARANTINE_FILE)).to_pylist()
    assert [row["uri"] for row in rows] == [f"{root}/cat/link.png", f"{root}/cat/notes.txt"]
    assert [row["reason"].partition(":")[0] for row in rows] == ["missing", "not_an_image"]
    assert f"left out {root}/cat/notes.txt: not_an_image" in "\n".join(said)


def test_what_could_not_be_trained_on_gets_no_index(ray_with_s3, make_tree, tmp_path):
    root, _ = make_tree(cat=3)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"split 'val' would hold none of the 3 images.*0\.0001"):
        pack(root, str(out), val_fraction=0.0001, say=ignore)
    Path(root, "dog").mkdir()
    Path(root, "dog", "a.txt").write_text("no image")
    with pytest.raises(UserError, match=r"class folder .*/dog holds no file that is an image"):
        pack(root, str(out), say=ignore)
    assert not (out / "INDEX.json").exists()


def test_a_killed_pack_leaves_no_index_and_is_finished_by_a_rerun(ray_with_s3, make_tree, tmp_path):
    root, files = make_tree(cat=600, dog=600)
    out = tmp_path / "out"
    script = (
        "import sys; from orchestrator.data.packing.pack import pack;"
        "pack(sys.argv[1], sys.argv[2], unit_images=4, say=print)"
    )
    env = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with subprocess.Popen([sys.executable, "-c", script, root, str(out)], env=env) as driver:
        while len(list(out.glob("units/*/*.json"))) < 10:
            assert driver.poll() is None
            time.sleep(0.01)
        driver.send_signal(signal.SIGKILL)
    _wait_until_still(out)
    done = {path: t for path, t in modified(out).items() if not path.endswith(".tmp")}
    num_done = sum("/units/" in path for path in done)
    assert 10 <= num_done < 300
    with pytest.raises(UserError, match="its packing was interrupted"):
        read_index(str(out))
    index = pack(root, str(out), unit_images=4, say=ignore)
    assert {row["id"]: row["image"] for _, row in read_rows(index)} == files
    after = modified(out)
    redone = [path for path in done if after[path] != done[path]]
    # A shard that was written when the kill came has no marker yet: its unit is done again.
    finished = {_unit_of(path) for path in done if "/units/" in path}
    assert not [path for path in redone if _unit_of(path) in finished]


def _unit_of(path):
    part, stem = Path(path).parent.name, Path(path).stem
    return f"{part}-{stem}" if "/units/" in path else stem


def _wait_until_still(folder):
    before = None
    while before != (before := modified(folder)):
        time.sleep(1)


def test_from_s3_to_s3(ray_with_s3):
    bucket = ray_with_s3.make_bucket("packing")
    files = write_tree(f"{bucket}/images", {"cat": 40, "dog": 40})
    storage.write_atomic(f"{bucket}/images/dog/broken.png", b"no image")
    index = pack(f"{bucket}/images/", f"{bucket}/shards", unit_images=30, say=ignore)
    assert {row["id"]: row["image"] for _, row in read_rows(index)} == files
    rows = pq.read_table(storage.open_input(f"{bucket}/shards/{QUARANTINE_FILE}")).to_pylist()
    assert [row["uri"] for row in rows] == [f"{bucket}/images/dog/broken.png"]
    assert pack(f"{bucket}/images", f"{bucket}/shards", unit_images=30, say=ignore) == index


def test_s3_mistakes_end_in_one_sentence(ray_with_s3, make_tree):
    bucket = ray_with_s3.make_bucket("mistakes")
    root, _ = make_tree(cat=2)
    with pytest.raises(UserError, match=r"cannot list s3://not-there/x: there is no such bucket"):
        pack("s3://not-there/x", f"{bucket}/out", say=ignore)
    with pytest.raises(UserError, match=r"cannot write s3://not-there/out/.*no such bucket"):
        pack(root, "s3://not-there/out", say=ignore)
    with pytest.raises(UserError, match=r"--source s3://mistakes/nothing holds nothing"):
        pack(f"{bucket}/nothing", f"{bucket}/out", say=ignore)
    with (
        environment({"AWS_SECRET_ACCESS_KEY": "wrong"}),
        pytest.raises(UserError, match="the credentials are wrong"),
    ):
        pack(f"{bucket}/images", f"{bucket}/out", say=ignore)


def test_a_mistake_that_a_task_finds_ends_in_one_sentence(ray_with_s3, make_tree, tmp_path):
    root, _ = make_tree(cat=30)
    out = tmp_path / "out"
    out.mkdir()
    (out / "train").write_text("in the way")
    with pytest.raises(UserError, match=r"a file lies where a folder is needed") as caught:
        pack(root, str(out), say=ignore)
    assert "\n" not in str(caught.value)
