"""One process at a time: the others are refused, or take other items."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import train, write_cohort

from ds_wsi.cli import main
from ds_wsi.evaluation import extract
from ds_wsi.runtime.locks import (
    Claims,
    HeldError,
    holder,
    is_lock,
    lock_path,
    only_one,
    release,
    remove_dead_locks,
    shared_map,
    take,
)
from ds_wsi.training import loop

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
    queue.put(take(path) is not None)


def _another_gets_it(path):
    process = FORK.Process(target=_try, args=(path, queue := FORK.Queue()))
    process.start()
    got = queue.get(timeout=10)
    process.join()
    return got


@pytest.mark.parametrize("spelt", ["as it is", "by a link", "through another folder"])
def test_a_second_attempt_in_the_process_does_not_let_the_lock_go(tmp_path, spelt):
    """Closing any descriptor of a locked file would: neither asking for it nor asking who holds it may open it."""
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(folder)
    again = {"as it is": folder, "by a link": tmp_path / "link", "through another folder": tmp_path / "other/../run"}
    with only_one(folder, "--output_dir", "wait"):
        with (
            pytest.raises(HeldError, match=f"process {os.getpid()} on this machine"),
            only_one(again[spelt], "--output_dir", "wait"),
        ):
            pass
        assert take(lock_path(again[spelt])) is None
        assert str(os.getpid()) in holder(lock_path(again[spelt]))
        remove_dead_locks(again[spelt])
        assert not _another_gets_it(lock_path(folder))
    assert _another_gets_it(lock_path(folder))


def test_of_two_threads_that_ask_at_once_one_gets_it(tmp_path, monkeypatch):
    from ds_wsi.runtime import locks

    path, real, taken = lock_path(tmp_path), locks._locked, []

    def asked_for_meanwhile(wanted):
        if not taken:
            taken.append(None)
            taken[0] = take(path)
        return real(wanted)

    monkeypatch.setattr(locks, "_locked", asked_for_meanwhile)
    lock = take(path)
    assert lock is not None
    assert taken == [None], "both got it"
    assert not _another_gets_it(path)
    release(path, lock)


def test_what_could_not_be_locked_is_not_taken_for_held(tmp_path):
    path = lock_path(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        take(path)
    path.parent.mkdir()
    process = held_by_another(path)
    assert take(path) is None
    process.kill()
    process.join()
    release(path, take(path))


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
    assert all(len(outcomes) == len(names) and set(outcomes) <= {"done", "kept"} for outcomes in results)


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


def test_the_same_command_twice_is_refused_and_the_first_goes_on(tmp_path, monkeypatch, capfd):
    """Also where both begin at once: nothing of the second one's is in the folder."""
    folder, twice = write_cohort(tmp_path), []
    real = loop.train_step

    def step(run, *rest):
        if not twice:
            queue = FORK.Queue()
            second = FORK.Process(target=_second, args=(folder, queue))
            second.start()
            twice.append(queue.get(timeout=120))
            second.join()
        return real(run, *rest)

    monkeypatch.setattr(loop, "train_step", step)
    assert train(folder, folder / "run", epochs=1) == 0
    assert twice == [2]
    words = capfd.readouterr().err
    assert (
        f"--output_dir must not be in use, got {folder / 'run'}, in which process {os.getpid()} on this machine"
        in words
    )
    assert not [path for path in (folder / "run").iterdir() if is_lock(path)]


def _second(folder, queue):
    loop.train_step = None
    queue.put(train(folder, folder / "run", "--resume_from_checkpoint", epochs=1))


def test_commands_that_share_a_folder_of_features_write_each_slide_once(demo_manifest, tmp_path):
    """Three at once, one of them killed in its midst: the others end with all of it."""
    words = ["features", "--manifest", str(demo_manifest), "--encoder", "resnet10t", "--tile_size_px", "64"]
    words += [
        "--output_dir",
        str(tmp_path / "shared"),
        "--dataloader_num_workers",
        "0",
        "--tiles_dir",
        str(tmp_path / "t"),
    ]
    alone = [*words[:-5], str(tmp_path / "alone"), *words[-4:]]
    assert main(alone) == 0
    queue, in_its_midst, beside_it = FORK.Queue(), FORK.Event(), FORK.Event()
    killed = FORK.Process(target=_killed_in_its_second_slide, args=(words, in_its_midst, beside_it))
    killed.start()
    assert in_its_midst.wait(240)
    others = [FORK.Process(target=_features, args=(words, beside_it, queue)) for _ in range(2)]
    for process in others:
        process.start()
    written = [queue.get(timeout=240) for _ in others]
    for process in (killed, *others):
        process.join()
    assert killed.exitcode == -signal.SIGKILL
    names = sorted(path.name for path in (tmp_path / "alone").glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == sorted([*names, "features_summary.csv"])
    for name in names:
        shared, expected = (load_file(tmp_path / folder / name) for folder in ("shared", "alone"))
        assert shared.keys() == expected.keys()
        assert all(torch.equal(shared[key], expected[key]) for key in expected)
    assert all(code == 0 for code, _ in written)
    assert sum(count for _, count in written) == len(names) - 1, "a slide was done twice"


def _killed_in_its_second_slide(words, in_its_midst, beside_it):
    """It holds slides of its own and has written one, and dies after another process has written one too."""
    torch.set_num_threads(1)
    real, count = extract.write_features, [0]

    def write(*rest, **named):
        if count[0] == 1:
            in_its_midst.set()
            beside_it.wait(240)
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1
        return real(*rest, **named)

    extract.write_features = write
    main(words)


def _features(words, has_written, queue):
    torch.set_num_threads(1)
    real, count = extract.write_features, [0]

    def write(*rest, **named):
        count[0] += 1
        real(*rest, **named)
        has_written.set()

    extract.write_features = write
    code = main(words)
    queue.put((code, count[0]))
