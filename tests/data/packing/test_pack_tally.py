import pytest

from orchestrator.config import UserError
from orchestrator.data.formats.base import Bad
from orchestrator.data.index import Shard
from orchestrator.data.packing.settings import PackSettings
from orchestrator.data.packing.shard import UnitResult
from orchestrator.data.packing.tally import Tally


def tally_of(good, bad):
    left_out = tuple(Bad.of("u", str(i), "bad_label: 'x' is no number") for i in range(bad))
    shards = tuple(Shard(split, "p", good, 1, 0, (good,)) for split in ("train", "val"))
    tally = Tally()
    tally.add(UnitResult("", shards, left_out, {}, {}, ""))
    return tally


def test_a_pack_that_leaves_out_too_much_fails_with_the_reasons():
    settings = PackSettings("src")
    tally_of(450, 100).check(settings, (), folders=False)
    tally_of(10, 900).check(settings, (), folders=False)  # too few to say
    with pytest.raises(UserError, match=r"200 of 1,100 samples .*left out \(200 bad_label\); mend"):
        tally_of(450, 200).check(settings, (), folders=False)
    allowing = PackSettings("src", max_bad_fraction=0.5)
    tally_of(450, 200).check(allowing, (), folders=False)
    assert allowing.content() == settings.content()
    with pytest.raises(UserError, match="--max-bad-fraction must be 0 to 1, but it is 2"):
        PackSettings("src", max_bad_fraction=2).check()
