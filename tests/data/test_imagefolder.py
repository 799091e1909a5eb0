from pathlib import Path

import pytest

from orchestrator import s3, storage
from orchestrator.config import UserError
from orchestrator.data import imagefolder
from orchestrator.data.imagefolder import File, find_classes, list_units


def ignore(line: str) -> None:
    """Say nothing."""


def all_units(root, *, max_images=100):
    classes = find_classes(root, ignore)
    listers = range(imagefolder.num_listers(classes))
    return [u for i in listers for u in list_units(root, classes, lister=i, max_images=max_images)]


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
    assert sorted(f.id for u in units for f in u.files) == sorted(files)
    assert all(f.size == len(files[f.id]) for u in units for f in u.files)
    assert [len(u.files) for u in units] == [20, 20, 20, 20, 1]
    assert units == all_units(root, max_images=20)


def test_a_unit_mixes_classes(make_tree):
    root, _ = make_tree(cat=40, dog=40)
    first, *_ = all_units(root, max_images=20)
    assert [f.label for f in first.files].count(0) == 10
    assert [f.label for f in first.files] != sorted(f.label for f in first.files)


def test_many_classes_are_divided_among_listers(tmp_path):
    root = str(tmp_path)
    for i in range(130):
        storage.write_atomic(storage.join(root, f"class{i:03d}", "x.png"), b"x")
    units = all_units(root)
    assert len(units) == 3
    assert sorted(f.label for u in units for f in u.files) == list(range(130))


def test_nested_files_are_listed_and_hidden_ones_are_not(tmp_path):
    root = str(tmp_path)
    for name in ("cat/a.png", "cat/day/b.png", "cat/.cache/c.png", "cat/.DS_Store", ".git/d.png"):
        storage.write_atomic(storage.join(root, name), b"x")
    (unit,) = all_units(root)
    assert sorted(unit.files, key=lambda f: f.id) == [
        File("cat/a.png", 1, 0),
        File("cat/day/b.png", 1, 0),
    ]


def test_units_are_cut_by_bytes(make_tree, monkeypatch):
    root, files = make_tree(cat=10)
    monkeypatch.setattr(imagefolder, "UNIT_BYTES", 3 * max(map(len, files.values())))
    assert all(len(unit.files) <= 4 for unit in all_units(root))
    assert sum(len(unit.files) for unit in all_units(root)) == 10


@pytest.mark.slow
def test_a_bucket_is_listed_page_by_page(s3):
    from concurrent.futures import ThreadPoolExecutor

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
    assert [len(unit.files) for unit in all_units(root, max_images=600)] == [600, 500]


def orchestrator_client_events():
    """Return the hooks of the client under test, to count its requests."""
    return s3.client().s3.meta.events
