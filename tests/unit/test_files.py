import json
import os

import pytest

from ds_wsi.runtime.files import atomic_path, link_or_copy, write_json, write_text
from ds_wsi.runtime.temporary import is_temporary


def fail_half_way(path, error):
    before = path.read_text() if path.exists() else None
    with atomic_path(path) as temporary:
        temporary.write_text("ne")
        assert (path.read_text() if path.exists() else None) == before
        raise error


def test_text_and_json_round_trip(tmp_path):
    path = tmp_path / "new" / "folder" / "a.json"
    write_json(path, {"µm": [1, 2.5, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"µm": [1, 2.5, None]}
    write_text(path, "glass ± 1\n")
    assert path.read_text(encoding="utf-8") == "glass ± 1\n"
    assert os.listdir(path.parent) == ["a.json"]


def test_a_failing_block_leaves_the_old_content_and_no_temporary(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way(path, RuntimeError("half way"))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failing_block_leaves_nothing_where_there_was_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fail_half_way(tmp_path / "a.txt", KeyboardInterrupt())
    assert os.listdir(tmp_path) == []


def test_a_block_that_writes_nothing_is_an_error_and_keeps_the_old_content(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a.txt"):
        pass
    assert (tmp_path / "a.txt").read_text() == "old"


def test_temporary_is_in_a_hidden_folder_beside_the_file_and_keeps_its_name(tmp_path):
    with atomic_path(tmp_path / "curves.v2.png") as temporary:
        temporary.write_bytes(b"x")
        assert temporary.name == "curves.v2.png"
        assert temporary.parent.parent == tmp_path
        assert is_temporary(temporary.parent)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_json_cannot_hold_is_refused_and_the_old_file_kept(tmp_path, value):
    write_json(tmp_path / "a.json", {"auc": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "a.json", {"auc": value})
    assert json.loads((tmp_path / "a.json").read_text()) == {"auc": 1}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_outlives_the_first_with_links_and_without(links, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "b").write_text("older")
    write_text(tmp_path / "a", "content")
    for _ in range(2):  # onto itself, too
        link_or_copy(tmp_path / "a", tmp_path / "b")
        assert os.path.samefile(tmp_path / "a", tmp_path / "b") == links
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    write_text(tmp_path / "a", "newer")
    assert (tmp_path / "b").read_text() == "content"
