"""Local files that are no usual ones."""

import os

import pytest

from orchestrator import storage
from orchestrator.data.formats.reading import read_image


def test_pipes_are_not_listed(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"x")
    assert [entry.name for entry in storage.list_tree(str(tmp_path))] == ["file"]


def test_a_replaced_file_of_the_same_size_has_another_tag(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (before,) = storage.list_folder(str(tmp_path))
    os.utime(tmp_path / "file", ns=(1, 1))
    (after,) = storage.list_folder(str(tmp_path))
    assert before.etag != after.etag == storage.etag(str(tmp_path / "file"))


def test_links_in_a_circle_are_said(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "back").symlink_to(tmp_path / "a")
    with pytest.raises(storage.StorageError, match=r"cannot list .* lead in a circle; remove"):
        list(storage.list_tree(str(tmp_path)))


def test_paths_that_no_image_can_have_are_single_bad_samples(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "self").symlink_to("self")
    for name in ("folder", "file/below", "self", "n" * 300):
        bad = read_image(str(tmp_path / name), name, None)
        assert bad.reason.startswith("missing: "), name


def test_a_system_error_is_one_sentence(tmp_path):
    explained = {
        PermissionError(13, "denied"): (storage.DeniedError, "permission denied"),
        OSError(5, "Input/output error"): (storage.StorageError, "the disk reports an error"),
    }
    for error, (kind, message) in explained.items():
        with pytest.raises(kind, match=f"cannot read x: {message}"), storage.explained("x", "read"):
            raise error
