import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import time

import pytest
from safetensors.numpy import save_file

from ds_wsi.runtime import temporary
from ds_wsi.runtime.files import atomic_path, write_text
from ds_wsi.runtime.temporary import RECORD, is_temporary, remove_left_behind, temporary_folder

FOREIGN = (
    *(".env.tmpl", ".x.tmp", ".S1.abc.tmp.arrow", ".checkpoint-3.tmp", "S1.2.tmp", ".ds_wsi-notes.tmp"),
    *(".ds_wsi-0123.tmp", ".DS_WSI-0123456789abcdef0123456789abcdef.tmp", "ünï\n.tmp"),
)
WRITE_FOR_EVER = """
import sys, time
from ds_wsi.runtime.files import atomic_path
with atomic_path(sys.argv[1]) as path:
    path.write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def start_writer(path):
    writer = subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "writing\n"
    return writer


def end(writer, how=signal.SIGKILL):
    writer.send_signal(how)
    writer.wait()
    writer.stdout.close()


def test_what_a_killed_writer_left_is_removed_and_what_another_writes_is_not(tmp_path):
    for name in FOREIGN:
        (tmp_path / name).write_text(name)
    killed, alive = start_writer(tmp_path / "a.txt"), start_writer(tmp_path / "b.txt")
    try:
        end(killed)
        left = [path for path in tmp_path.iterdir() if is_temporary(path)]
        assert len(left) == 2
        remove_left_behind(tmp_path)
        (still,) = [path for path in tmp_path.iterdir() if is_temporary(path)]
        assert (still / "b.txt").read_text() == "half"
    finally:
        end(alive)
    remove_left_behind(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(FOREIGN)
    assert all((tmp_path / name).read_text() == name for name in FOREIGN)


def left_behind(folder, monkeypatch):
    """A temporary folder of a process that is gone, with a file in it."""
    with monkeypatch.context() as patch:
        patch.setattr(temporary.shutil, "rmtree", lambda *_, **__: None)
        with temporary_folder(folder) as path:
            (path / "half.txt").write_text("half")
    return path


def rewrite(path, **changes):
    record = json.loads((path / RECORD).read_text())
    (path / RECORD).write_text(json.dumps(record | changes))


def test_a_folder_without_a_record_of_its_own_is_not_ours(tmp_path, monkeypatch):
    folders = [left_behind(tmp_path, monkeypatch) for _ in range(5)]
    (folders[0] / RECORD).unlink()
    (folders[1] / RECORD).write_text("")
    rewrite(folders[2], name=folders[3].name)
    rewrite(folders[3], program="another")
    remove_left_behind(tmp_path)
    assert [path.exists() for path in folders] == [True] * 4 + [False]


def test_a_folder_whose_writer_was_killed_before_it_signed_is_removed(tmp_path):
    here = temporary._host_digits()
    names = [f".ds_wsi-{here}{digit * 24}.tmp" for digit in "0123"]
    for name in names:
        (tmp_path / name).mkdir()
    for name in names[1:3]:
        (tmp_path / name / RECORD).touch()
    for name in names[2:]:
        (tmp_path / name / "a.txt").write_text("a")  # which no writer of ours has where it has not signed
    # Another machine's writer may be about to sign: its lock need not show here.
    elsewhere = [f".ds_wsi-{'e' * 32}.tmp", f".ds_wsi-{'f' * 32}.tmp"]
    for name in elsewhere:
        (tmp_path / name).mkdir()
    (tmp_path / elsewhere[1] / RECORD).touch()
    remove_left_behind(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*names[2:], *elsewhere])
    for name in elsewhere:
        os.utime(tmp_path / name, (time.time() - 25 * 3600,) * 2)
    remove_left_behind(tmp_path)
    assert sorted(os.listdir(tmp_path)) == names[2:]


@pytest.mark.parametrize("moment", ["before its record", "before its lock"])
def test_a_writer_whose_folder_was_taken_for_left_behind_makes_another(moment, tmp_path, monkeypatch):
    removed, sign, lock = [], temporary._sign, fcntl.flock

    def start_elsewhere():
        if not removed:
            removed.extend(tmp_path.iterdir())
            remove_left_behind(tmp_path)

    def late_sign(folder):
        start_elsewhere()
        return sign(folder)

    def late_lock(descriptor, how):
        if how == fcntl.LOCK_EX:  # not the other start's own
            start_elsewhere()
        return lock(descriptor, how)

    if moment == "before its record":
        monkeypatch.setattr(temporary, "_sign", late_sign)
    else:
        monkeypatch.setattr(temporary.fcntl, "flock", late_lock)
    with temporary_folder(tmp_path) as folder:
        assert removed
        assert folder not in removed
        remove_left_behind(tmp_path)
        (folder / "a.txt").write_text("a")
        assert os.listdir(tmp_path) == [folder.name]
    assert os.listdir(tmp_path) == []


def test_another_machines_folder_is_left_for_a_day(tmp_path, monkeypatch):
    path = left_behind(tmp_path, monkeypatch)
    rewrite(path, host="elsewhere")
    remove_left_behind(tmp_path)
    assert path.exists()
    os.utime(path / RECORD, (time.time() - 25 * 3600,) * 2)
    remove_left_behind(tmp_path)
    assert not path.exists()


def test_links_are_neither_followed_nor_removed(tmp_path, monkeypatch):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir(), inside.mkdir()
    path = left_behind(outside, monkeypatch)
    (inside / path.name).symlink_to(path)
    (path / "link").symlink_to(outside)
    (outside / "kept.txt").write_text("kept")
    remove_left_behind(inside)
    assert (inside / path.name).is_symlink()
    assert (path / "half.txt").exists()
    remove_left_behind(outside)
    assert os.listdir(outside) == ["kept.txt"]
    remove_left_behind(tmp_path / "none")


def test_a_link_at_the_final_name_is_replaced_and_its_target_kept(tmp_path):
    target = tmp_path / "target.txt"
    target.write_text("theirs")
    (tmp_path / "a.txt").symlink_to(target)
    write_text(tmp_path / "a.txt", "ours")
    assert target.read_text() == "theirs"
    assert not (tmp_path / "a.txt").is_symlink()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_permissions_are_the_umasks_whatever_the_writer_chose(umask, mode, tmp_path):
    import numpy as np

    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "text")
        with atomic_path(tmp_path / "a.safetensors") as path:
            save_file({"a": np.zeros(1)}, path)  # the library keeps its file to the owner
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}


def test_no_two_names_are_the_same_and_none_that_is_there_is_taken(tmp_path, monkeypatch):
    with temporary_folder(tmp_path) as first, temporary_folder(tmp_path) as second:
        assert first != second
        monkeypatch.setattr(temporary.secrets, "token_hex", lambda _: first.name[16:-4])
        (first / "a").write_text("a")
        with pytest.raises(FileExistsError), temporary_folder(tmp_path):
            pass
        assert (first / "a").exists()
