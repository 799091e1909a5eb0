import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.formats import base
from orchestrator.data.formats.base import File, Unit
from orchestrator.data.formats.files import list_files
from orchestrator.data.formats.imagefolder import find_classes, find_cuts, open_folder
from orchestrator.data.packing.units import Lister
from orchestrator.stores import s3


def ignore(line: str) -> None:
    """Say nothing."""


def all_units(root, *, max_images=100, cuts=()):
    tree = dataclasses.replace(open_folder(root, ignore), cuts=cuts)
    listers = [Lister(tree, part, f"{root}-out", 0, max_images) for part in range(tree.parts)]
    return [unit for lister in listers for unit in lister.run() if isinstance(unit, Unit)]


def test_classes_are_sorted_folders_and_loose_files_are_named(make_tree):
    root, _ = make_tree(dog=1, cat=1, Ant=1)
    Path(root, "readme.txt").write_text("x")
    Path(root, ".DS_Store").write_text("x")
    said = []
    assert find_classes(root, said.append) == ["Ant", "cat", "dog"]
    assert said == [f"left out 1 files directly in {root}: they are in no class folder"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "is no folder"),
        ([], "holds nothing"),
        (["a.png", "b.png"], "holds 2 files but no class folder"),
        (["cat/1.png", "dog/.DS_Store"], "class folder .*/dog holds no images"),
    ],
)
def test_a_tree_without_classes_or_images_is_refused(tmp_path, files, message):
    root = tmp_path / "images"
    for name in files or []:
        storage.write_atomic(str(root / name), b"x")
    if files == []:
        root.mkdir()
    with pytest.raises(UserError, match=message):
        find_classes(str(root), ignore)


def test_units_hold_every_file_once_and_never_change(make_tree):
    root, files = make_tree(cat=50, dog=30, emu=1)
    units = all_units(root, max_images=20)
    assert sorted(f.id for u in units for f in u.items) == sorted(files)
    assert all(f.size == len(files[f.id]) for u in units for f in u.items)
    assert [len(u.items) for u in units] == [20, 20, 20, 20, 1]
    assert units == all_units(root, max_images=20)


def test_a_unit_mixes_classes(make_tree):
    root, _ = make_tree(cat=40, dog=40)
    first, *_ = all_units(root, max_images=20)
    assert [f.label for f in first.items].count(0) == 10
    assert [f.label for f in first.items] != sorted(f.label for f in first.items)


def test_many_classes_are_divided_among_listers(tmp_path):
    root = str(tmp_path)
    for i in range(130):
        storage.write_atomic(storage.join(root, f"class{i:03d}", "x.png"), b"x")
    units = all_units(root)
    assert len(units) == 3
    assert sorted(f.label for u in units for f in u.items) == list(range(130))


def test_nested_files_are_listed_and_hidden_ones_are_not(tmp_path):
    root = str(tmp_path)
    for name in ("cat/a.png", "cat/day/b.png", "cat/.cache/c.png", "cat/.DS_Store", ".git/d.png"):
        storage.write_atomic(storage.join(root, name), b"x")
    (unit,) = all_units(root)
    assert sorted(unit.items, key=lambda f: f.id) == [
        File(name, 1, 0, storage.etag(storage.join(root, name)))
        for name in ("cat/a.png", "cat/day/b.png")
    ]


def test_units_are_cut_by_bytes(make_tree, monkeypatch):
    root, files = make_tree(cat=10)
    monkeypatch.setattr(base, "UNIT_BYTES", 3 * max(map(len, files.values())))
    assert all(len(unit.items) <= 4 for unit in all_units(root))
    assert sum(len(unit.items) for unit in all_units(root)) == 10


def test_keys_with_an_empty_part_are_no_class_and_no_container(monkeypatch):
    # The pages as S3 answers: the server of the tests cannot store such keys.
    def pages(bucket, prefix, *, delimiter, after=""):
        keys = ["src//a.tar", "src//dog/2.png", "src/cat/1.png"]
        below = [key for key in keys if key.startswith(prefix)]
        folders = sorted({f"{prefix}{key[len(prefix) :].partition('/')[0]}/" for key in below})
        files = [{"Key": key, "Size": 1, "ETag": '"1"'} for key in below]
        yield (
            {"CommonPrefixes": [{"Prefix": f} for f in folders]}
            if delimiter
            else {"Contents": files}
        )

    monkeypatch.setattr(s3, "list_pages", pages)
    said = []
    assert find_classes("s3://b/src", said.append) == ["cat"]
    assert said == ["left out what lies below s3://b/src//: its class would have no name"]
    with pytest.raises(UserError, match=r"src//a.tar has `//` in its key"):
        list(list_files("s3://b/src", (".tar",)))


@pytest.mark.slow
def test_a_bucket_is_listed_page_by_page(s3):
    root = storage.join(s3.make_bucket("listing"), "images")
    names = [f"cat/{i:05d}.png" for i in range(1100)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: storage.write_atomic(storage.join(root, n), b"x"), names))
    pages = []
    files = storage.list_tree(root)
    events = orchestrator_client_events()
    events.register("before-call.s3.ListObjectsV2", lambda **_: pages.append(1))
    listed = [next(files).name for _ in range(1000)]
    assert len(pages) == 1
    listed += [file.name for file in files]
    assert len(pages) == 2
    assert listed == names
    assert [len(unit.items) for unit in all_units(root, max_images=600)] == [600, 500]


def orchestrator_client_events():
    """Return the hooks of the client under test, to count its requests."""
    return s3.client().s3.meta.events


CUT_NAMES = [f"img_{i:04d}.png" for i in range(300)] + ["zebra/1.png", "\u00e9t\u00e9.png"]


def write_names(folder):
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: storage.write_atomic(storage.join(folder, n), b"x"), CUT_NAMES))


def test_a_huge_class_is_cut_into_ranges_that_hold_every_file_once(tmp_path):
    folder = str(tmp_path / "images" / "cat")
    write_names(folder)
    cuts = find_cuts(folder, 8, huge=100)
    assert len(cuts) >= 7
    assert list(cuts) == sorted(cuts)
    units = all_units(str(tmp_path / "images"), cuts=(cuts,))
    assert sorted(f.id for u in units for f in u.items) == sorted(f"cat/{n}" for n in CUT_NAMES)
    assert len({unit.name.partition("/")[0] for unit in units}) >= 5
    assert find_cuts(folder, 8) == ()


@pytest.mark.slow
def test_a_huge_class_of_a_bucket_is_cut_alike(s3):
    root = storage.join(s3.make_bucket("cuts"), "images")
    write_names(f"{root}/cat")
    cuts = find_cuts(f"{root}/cat", 8, huge=100)
    assert len(cuts) >= 7
    units = all_units(root, cuts=(cuts,))
    assert sorted(f.id for u in units for f in u.items) == sorted(f"cat/{n}" for n in CUT_NAMES)
