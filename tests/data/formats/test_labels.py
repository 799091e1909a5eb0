from decimal import Decimal

import pytest

from orchestrator.config import UserError
from orchestrator.data.formats.labels import BadLabel, Labels, infer
from orchestrator.data.formats.request import Request, read_classes


@pytest.mark.parametrize(
    ("values", "kind", "named"),
    [
        ([0, 1, 2], "class", False),
        (["0", " 12\n"], "class", False),
        (["cat", "7"], "class", True),
        (["007", "12"], "class", True),
        (["1_1", "2"], "class", True),
        ([Decimal("1.5"), Decimal(2)], "float", False),
        ([0.5, 1], "float", False),
        (["0.5", "1e3"], "float", False),
        ([[1, 2], []], "multi", False),
        (["[1, 2]", "[]"], "multi", False),
        ([["cat"], ["dog", "cat"]], "multi", True),
        ([None, ""], "none", False),
        ([], "none", False),
        (["__import__('os')"], "class", True),
    ],
)
def test_kinds_are_found_out(values, kind, named):
    assert infer(values) == (kind, named)


def test_a_name_that_is_a_number_is_a_name_where_the_user_lists_it():
    assert infer(["7", "9"], classes=("7", "9")) == ("class", True)


def test_a_number_is_a_place_among_classes_also_where_they_are_called_by_digits():
    digits = ("1", "0", "2")
    for values in ([0, 1, 2], [[0, 1], [2]]):
        labels = Request().labels("label", values, digits)
        assert not labels.named
        assert labels.parse(values[0]) in (0, (0, 1))


@pytest.mark.parametrize(
    ("labels", "raw", "label"),
    [
        (Labels("class"), "7", 7),
        (Labels("class"), 7.0, 7),
        (Labels("class", named=True, classes=("cat", "dog")), " dog ", 1),
        (Labels("multi"), "[3, 1]", (1, 3)),
        (Labels("multi"), [], ()),
        (Labels("multi", named=True, classes=("cat", "dog")), ["dog"], (1,)),
        (Labels("float"), "-2.5", -2.5),
        (Labels("none"), object(), None),
    ],
)
def test_raw_labels_become_labels_of_shards(labels, raw, label):
    assert labels.parse(raw) == label


@pytest.mark.parametrize(
    ("labels", "raw"),
    [
        (Labels("class"), -1),
        (Labels("class"), "1.5"),
        (Labels("class"), 1.5),
        (Labels("class"), Decimal("1.5")),
        (Labels("class"), "1_1"),
        (Labels("class"), "007"),
        (Labels("float"), "1_1"),
        (Labels("multi"), [0, 0, 1, 0]),
        (Labels("class"), None),
        (Labels("class"), 1 << 40),
        (Labels("class"), "9" * 5000),
        (Labels("class"), {}),
        (Labels("class", named=True, classes=("cat",)), ""),
        (Labels("class", named=True, classes=("cat",)), "\udcff"),
        (Labels("multi"), "cat"),
        (Labels("multi"), "[" * 100_000),
        (Labels("float"), "nan"),
        (Labels("float"), float("inf")),
        (Labels("float"), "cat"),
    ],
)
def test_a_label_that_does_not_fit_is_one_bad_sample(labels, raw):
    with pytest.raises(BadLabel, match=r"^(bad|no)_label: "):
        labels.parse(raw)


def test_what_was_asked_for_and_cannot_be_is_refused(tmp_path):
    with pytest.raises(UserError, match="--label-kind float needs labels, but none were found"):
        Request(label_kind="float").labels("", [])
    with pytest.raises(
        UserError, match=r"--label-kind multi does not fit column 'y' \(bad_label: 5"
    ):
        Request(label_kind="multi").labels("y", [5, 6])
    with pytest.raises(UserError, match=r"--id-column x is no column .*it has a, b"):
        Request(id_column="x").column("id", ["a", "b"], ())
    listed = tmp_path / "classes.txt"
    listed.write_text("cat\ndog\n\ncat\n")
    with pytest.raises(UserError, match="names 'cat' twice"):
        read_classes(str(listed))
    listed.write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        read_classes(str(listed))
    listed.write_text("dog\n cat \n")
    assert read_classes(str(listed)) == ("dog", "cat")
