"""What a rank sees of the others in the store, look by look."""

import torch.distributed as dist

from ds_wsi.runtime import ranks
from ds_wsi.runtime.ranks import RankWatch


def test_a_silent_rank_is_told_once_and_those_that_beat_or_left_never():
    store = dist.HashStore()
    watch = RankWatch(store, 0, 4)
    assert watch.look() == []  # nobody has begun
    told = []
    for look in range(4 * ranks._LOST):
        store.set(watch._key(1), str(look))
        store.set(watch._key(2), "5")
        store.set(watch._key(3), "left")
        told.append(watch.look())
    assert told[ranks._LOST] == [
        "rank 2/4 died without a word (killed, or out of memory?): no sign of it for 6 s",
    ]
    assert sum(map(len, told)) == 1
    store.set(watch._key(2), "6")  # it was only slow, and then fails with a reason
    assert watch.look() == []
    store.set(watch._key(2), "failed MemoryError: too many tiles")
    assert watch.look() == ["rank 2/4 failed (MemoryError: too many tiles)"]
    assert watch.look() == []


def test_a_failed_rank_leaves_its_reason_after_its_last_beat(monkeypatch):
    monkeypatch.setattr(ranks, "_BEAT_S", 0.01)
    store = dist.HashStore()
    watch = RankWatch(store, 1, 2)
    watch.start()
    watch.end("failed ValueError: torn")
    assert not watch._thread.is_alive()
    assert RankWatch(store, 0, 2).look() == ["rank 1/2 failed (ValueError: torn)"]


def test_a_lost_store_is_told_by_the_thread_itself(monkeypatch, caplog):
    monkeypatch.setattr(ranks, "_BEAT_S", 0.01)
    watch = RankWatch(dist.HashStore(), 0, 2)

    class Gone:
        def set(self, key, value):
            raise RuntimeError("Broken pipe")

    watch.store = Gone()
    watch.start()
    watch._thread.join(5)
    assert not watch._thread.is_alive()
    assert "the process that keeps the ranks' addresses (rank 0, or the launcher) is gone (Broken pipe)" in caplog.text
