import dataclasses

import pytest
from conftest import encode_png

from orchestrator import storage
from orchestrator.config import UserError
from orchestrator.data.formats import base
from orchestrator.data.formats.base import File, Survey, Unit
from orchestrator.data.formats.imagefolder import open_folder
from orchestrator.data.formats.manifest import open_manifests
from orchestrator.data.formats.request import Request
from orchestrator.data.packing.known import Known
from orchestrator.data.packing.settings import PackSettings
from orchestrator.data.packing.shard import UnitResult, marker_uri, pack_unit
from orchestrator.data.packing.units import Listed, Lister


def ignore(line):
    """Say nothing."""


@pytest.fixture
def tree(make_tree):
    root, _ = make_tree(cat=10, dog=10)
    return open_folder(root, ignore)


def run(tree, out, generation, *, pack=True):
    """Run the one lister and pack its units; return (results, units, totals)."""
    settings = PackSettings(tree.source)
    found = list(Lister(tree, 0, out, generation, 6).run())
    units = [f for f in found if isinstance(f, Unit)]
    results = [f for f in found if isinstance(f, UnitResult)]
    for unit in units if pack else ():
        results.append(pack_unit(unit, out, settings, tree))
    assert isinstance(found[-1], Listed)
    return results, units, found[-1]


def ids(units):
    return {item.id for unit in units for item in unit.items}


def test_only_what_is_new_becomes_units(tree, tmp_path):
    out = str(tmp_path / "out")
    first, units, totals = run(tree, out, 0)
    assert len(ids(units)) == 20
    assert totals == Listed(0, 0, 0)
    for name in ("cat/a.png", "dog/z.png"):
        storage.write_atomic(f"{tree.source}/{name}", encode_png(99))
    second, units, totals = run(tree, out, 1)
    assert ids(units) == {"cat/a.png", "dog/z.png"}
    assert totals == Listed(20, 0, 0)
    assert sum(result.images for result in second) == 22
    shards = {shard for result in second for shard in result.shards}
    assert {shard for result in first for shard in result.shards} < shards
    storage.delete_file(f"{tree.source}/cat/a.png")
    storage.write_atomic(f"{tree.source}/dog/z.png", encode_png(98, side=32))
    third, units, totals = run(tree, out, 2)
    assert units == []
    assert totals == Listed(20, 1, 1)
    assert sum(result.images for result in third) == 22


def test_a_generation_that_was_killed_is_done_by_what_the_source_is_now(tree, tmp_path):
    out = str(tmp_path / "out")
    run(tree, out, 0)
    for i in range(20):
        storage.write_atomic(f"{tree.source}/cat/new{i}.png", encode_png(i))
    _, units, _ = run(tree, out, 1)
    assert len(units) == 4
    for i in range(5, 20):
        storage.delete_file(f"{tree.source}/cat/new{i}.png")
    _, units, _ = run(tree, out, 1)
    assert [u.name for u in units] == ["00000/0001-000000"]
    assert not storage.exists(marker_uri(out, "00000/0001-000001"))
    _, units, totals = run(tree, out, 2)
    assert units == []
    assert totals == Listed(25, 0, 0)


def test_a_damaged_marker_of_an_earlier_pack_is_named(tree, tmp_path):
    out = str(tmp_path / "out")
    _, units, _ = run(tree, out, 0)
    storage.write_atomic(marker_uri(out, units[0].name), b"{")
    with pytest.raises(UserError, match=r"000000\.json is damaged.*another --out"):
        run(tree, out, 1)


def test_repeated_ids_of_a_manifest_are_left_out_by_every_pack(tmp_path):
    lines = ["uri,id", "a.png,1", "b.png,2", "c.png,1"]
    storage.write_atomic(f"{tmp_path}/set/list.csv", "\n".join(lines).encode())
    for i, name in enumerate("abc"):
        storage.write_atomic(f"{tmp_path}/set/{name}.png", encode_png(i))
    source = open_manifests(f"{tmp_path}/set/list.csv", Request())
    for generation in range(2):
        results, _, totals = run(source, str(tmp_path / "out"), generation)
        assert sum(result.images for result in results) == 2
        bad = [entry for result in results for entry in result.bad]
        assert [(b.id, b.reason.partition(":")[0]) for b in bad] == [("1", "duplicate")]
        assert totals == Listed(2 * generation, 0, 0)


def test_more_names_than_classes_can_be_are_refused(monkeypatch):
    monkeypatch.setattr(base, "MAX_CLASSES", 3)
    total = Survey(names={"a", "b"})
    with pytest.raises(UserError, match="more than 3 different texts"):
        total.merge(Survey(names={"c", "d"}))


def test_items_are_recognised_by_id_and_stamp():
    files = [File(f"{i}", i, 0) for i in range(100)]
    known = Known.from_texts([Known.of(files[:50]).to_text(), Known.of(files[50:]).to_text()])
    assert len(known) == 100
    assert known.meet(files[7]) == "kept"
    assert known.meet(dataclasses.replace(files[8], size=1000)) == "changed"
    assert known.meet(dataclasses.replace(files[9], label=3)) == "changed"
    assert known.meet(File("new", 1, 0)) == "new"
    assert (known.changed, known.gone) == (2, 97)
    assert Known.from_texts([]).meet(files[0]) == "new"
