"""One process at a time: the others are refused, or take other items."""

import multiprocessing
import os
import signal
import time

import pytest

from ds_wsi.runtime.locks import Claims, HeldError, is_lock, lock_path, only_one, release, shared_map, take

FORK = multiprocessing.get_context("fork")


def _hold(path, ready, seconds):
    assert take(path) is not None
    ready.set()
    time.sleep(seconds)


def held_by_another(path, seconds=60):
    """A process that holds the lock."""
    ready = FORK.Event()
    process = FORK.Process(target=_hold, args=(path, ready, seconds))
    process.start()
    assert ready.wait(10)
    return process


def test_the_second_is_refused_by_a_sentence_that_names_the_first(tmp_path):
    process = held_by_another(lock_path(tmp_path))
    try:
        with (
            pytest.raises(
                HeldError, match=rf"--output_dir must .*process {process.pid} on this machine .*since 20.*HINT: wait"
            ),
            only_one(tmp_path, "--output_dir", "wait"),
        ):
            pass
    finally:
        process.kill()
        process.join()
    with only_one(tmp_path, "--output_dir", "wait"):  # of a process that was killed: its file is taken over
        assert [is_lock(path) for path in tmp_path.iterdir()] == [True]
        with pytest.raises(HeldError), only_one(tmp_path, "--output_dir", "wait"):  # the same process is another run
            pass
    assert not list(tmp_path.iterdir())


def test_a_forked_child_neither_holds_nor_frees_its_parents_lock(tmp_path):
    with only_one(tmp_path, "folder", "wait"):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        process = FORK.Process(target=_try, args=(lock_path(tmp_path), queue := FORK.Queue()))
        process.start()
        assert queue.get(timeout=10) is False
        process.join()


def _try(path, queue):
    from ds_wsi.runtime import locks

    locks._held.clear()  # what the fork inherited
    queue.put(take(path) is not None)


def test_a_symbolic_link_is_not_followed(tmp_path):
    target = tmp_path / "mine.txt"
    target.write_text("mine")
    lock_path(tmp_path).symlink_to(target)
    with pytest.raises(OSError, match="ymbolic"):
        take(lock_path(tmp_path))
    assert target.read_text() == "mine"


def test_a_lock_that_was_removed_meanwhile_is_no_lock(tmp_path, monkeypatch):
    """Between opening and locking the holder removes the file: the next one's file is another."""
    path = lock_path(tmp_path)
    from ds_wsi.runtime import locks

    real, calls = locks.fcntl.lockf, []

    def lockf(descriptor, how):
        real(descriptor, how)
        calls.append(descriptor)
        if len(calls) == 1:
            os.unlink(path)

    monkeypatch.setattr(locks.fcntl, "lockf", lockf)
    lock = take(path)
    assert len(calls) == 2
    assert path.exists()
    release(path, lock)
    assert not path.exists()


def _work(folder, names, queue, kill_at):
    done = []

    def work(name):
        made = folder / f"{name}.done"
        if made.exists():
            return "kept"
        time.sleep(0.02)
        if len(done) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with made.open("x") as file:  # twice would fail
            file.write(str(os.getpid()))
        done.append(name)
        return "done"

    queue.put(shared_map(names, lambda name: lock_path(folder, name), work, 2))


@pytest.mark.parametrize("kill_at", [None, 3])
def test_processes_with_the_same_items_do_each_once(tmp_path, kill_at):
    names = [f"slide {number}" for number in range(24)]
    queue = FORK.Queue()
    killed = FORK.Process(target=_work, args=(tmp_path, names, queue, kill_at))
    others = [FORK.Process(target=_work, args=(tmp_path, names, queue, None)) for _ in range(2)]
    for process in (killed, *others):
        process.start()
    results = [queue.get(timeout=60) for _ in range(3 if kill_at is None else 2)]
    for process in (killed, *others):
        process.join()
    assert sorted(path.stem for path in tmp_path.glob("*.done")) == sorted(names)
    makers = {path.read_text() for path in tmp_path.glob("*.done")}
    assert len(makers) > 1, "one process did all: the test proved nothing"
    assert all(len(found) == len(names) and set(found) <= {"done", "kept"} for found in results)


def test_claims_are_let_go_at_the_end_and_by_an_error(tmp_path):
    path_of = lambda name: lock_path(tmp_path, name)  # noqa: E731
    other = held_by_another(path_of("b"))
    try:
        claims = Claims(["a", "b", "c"], path_of)
        free = claims.free()
        assert next(free) == "a"
        assert next(free) == "c"
        assert next(free, None) is None
        claims.give_back("a")
        assert claims.left == ["b", "c"]
        with pytest.raises(ZeroDivisionError), claims:
            raise ZeroDivisionError
    finally:
        other.kill()
        other.join()
    with Claims(["b", "c"], path_of) as claims:
        assert list(claims.free()) == ["b", "c"]
    assert not list(tmp_path.iterdir())
