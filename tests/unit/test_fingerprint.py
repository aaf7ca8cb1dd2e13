import os

import pytest

from ds_wsi.runtime import fingerprint
from ds_wsi.runtime.fingerprint import file_fingerprint
from ds_wsi.slides.fingerprint import slide_fingerprint


def test_a_copy_a_link_and_a_touched_file_have_the_same(tmp_path):
    (tmp_path / "a.svs").write_bytes(bytes(range(256)))
    fingerprint = slide_fingerprint(tmp_path / "a.svs")
    (tmp_path / "b.tif").write_bytes(bytes(range(256)))
    (tmp_path / "c.svs").symlink_to("a.svs")
    os.utime(tmp_path / "a.svs", (1, 1))
    assert {slide_fingerprint(tmp_path / name) for name in ("a.svs", "b.tif", "c.svs")} == {fingerprint}
    assert fingerprint.n_bytes == 256


def test_a_file_that_was_replaced_is_read_again_also_with_its_old_time(tmp_path):
    path = tmp_path / "a.svs"
    path.write_bytes(b"a" * 100)
    os.utime(path, (1, 1))
    first = file_fingerprint(path)
    path.write_bytes(b"b" * 100)
    os.utime(path, (1, 1))
    assert file_fingerprint(path) != first


@pytest.mark.parametrize("place", range(0, 2000, 97))
def test_every_byte_of_a_file_that_is_hashed_whole_counts(place, tmp_path):
    content = bytearray(2000)
    (tmp_path / "a").write_bytes(content)
    content[place] = 1
    (tmp_path / "b").write_bytes(content)
    assert file_fingerprint(tmp_path / "a") != file_fingerprint(tmp_path / "b")


def test_of_a_large_file_head_end_and_evenly_spaced_pieces_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(fingerprint, "PIECE_BYTES", 10)
    monkeypatch.setattr(fingerprint, "N_PIECES", 5)
    content = bytearray(2010)
    (tmp_path / "a").write_bytes(content)
    first = file_fingerprint(tmp_path / "a")
    seen = []
    for position in range(2010):
        if position % 500 in (0, 9, 10, 499):
            other = bytearray(content)
            other[position] = 1
            (tmp_path / f"b{position}").write_bytes(other)
            seen += [position] if file_fingerprint(tmp_path / f"b{position}") != first else []
    assert seen == [0, 9, 500, 509, 1000, 1009, 1500, 1509, 2000, 2009]
    (tmp_path / "c").write_bytes(content + b"\0")
    assert file_fingerprint(tmp_path / "c") != first


def test_a_mirax_slide_is_known_by_the_files_that_hold_its_pixels(tmp_path):
    (tmp_path / "s.mrxs").write_bytes(b"\xff\xd8")
    alone = slide_fingerprint(tmp_path / "s.mrxs")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "Data0000.dat").write_bytes(b"pixels")
    first = slide_fingerprint(tmp_path / "s.mrxs")
    (tmp_path / "s" / "Data0000.dat").write_bytes(b"others")
    assert len({alone, first, slide_fingerprint(tmp_path / "s.mrxs")}) == 3


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        slide_fingerprint(tmp_path / "none.svs")
