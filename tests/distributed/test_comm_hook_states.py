"""What hooks keep between steps, what they count, and what a resumed run goes on with."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from comm_hook_cases import ENGINES, HOOKS, KEEP, ZERO, Trainer, each, first_error, register, trained
from compression_cases import CountedBytes

from ds_wsi.runtime.seams import missing_seams
from harness import run_ranks

pytestmark = pytest.mark.distributed


class Recorded:
    """A compressor behind a plain callable, so that each engine's own buckets come through."""

    def __init__(self, policy):
        from ds_wsi.compression import Compressor

        self.inner, self.given, self.means, self.buckets = Compressor(policy), {}, {}, []

    def __call__(self, state, bucket):
        from ds_wsi.compression import hook

        mean = hook(self.inner, bucket)
        self.buckets.append(tuple(bucket.names))
        for name, gradient, part in zip(
            bucket.names, bucket.buffer.split(bucket.numels), mean.split(bucket.numels), strict=True
        ):
            self.given[name] = self.given.get(name, 0) + gradient.float()
            self.means[name] = self.means.get(name, 0) + part.float()
        return mean


def owed(engine):
    """Largest difference of what came out + the mean of what is kept from what went in, and the buckets by step."""
    from ds_wsi.compression import DMGC, TopK
    from ds_wsi.engines.comm_hooks.register import register_comm_hook

    trainer = Trainer(engine)
    if engine == "ddp":
        trainer.model = torch.nn.parallel.DistributedDataParallel(trainer.module, bucket_cap_mb=0.0005)
    recorded = Recorded(TopK(keep=KEEP) if HOOKS[engine] == "topk" else DMGC(keep=KEEP, values="fp16"))
    register_comm_hook(trainer.model, recorded)
    by_step = []
    for _ in range(4):
        recorded.buckets.clear()
        trainer.step()
        by_step.append(list(recorded.buckets))
    worst = 0.0
    for name, residual in recorded.inner.residuals.snapshot()[0].items():
        both = torch.stack([recorded.given[name], residual])
        dist.all_reduce(both)
        given, kept = both / dist.get_world_size()
        worst = max(worst, float((recorded.means[name] + kept - given).abs().max()))
    names = {name for name, _ in trainer.module.named_parameters()}
    return {"worst": worst, "whole": set(recorded.given) == names, "buckets": by_step}


def test_what_came_out_and_what_is_kept_is_what_went_in():
    by_engine = run_ranks(each(owed), 2, ENGINES)[0]
    for engine, row in by_engine.items():
        assert row["whole"], engine
        assert row["worst"] < 1e-6, (engine, row)
    ddp = by_engine["ddp"]["buckets"]
    assert ddp[0] != ddp[1], "DDP was to rebuild its buckets, or the test proves nothing"


# --- bytes ---


def counted(engine):
    """The wire bytes of one step by the count, and by what torch.distributed was given."""
    from deepspeed import comm

    engine, _, hook = engine.partition(" ")
    trainer = Trainer(engine)
    handle = register(trainer, hook or HOOKS[engine], KEEP)
    trainer.step()
    before = handle.count.wire_bytes
    gathers = []
    native = comm.all_gather_into_tensor

    def gather(output, given, *rest, **more):
        gathers.append(given.nbytes)
        return native(output, given, *rest, **more)

    comm.all_gather_into_tensor = gather
    try:
        with CountedBytes() as calls:
            trainer.step()
    finally:
        comm.all_gather_into_tensor = native
    numel = sum(p.numel() for p in trainer.module.parameters())
    return {
        "count": handle.count.wire_bytes - before,
        "sent": calls.sent + calls.announced,
        "received": calls.received,
        "gathers": sum(gathers),
        "push": handle.count.push.messages[-1][0],
        "messages": len(handle.count.push.messages),
        "numel": numel,
    }


def test_bytes_are_those_of_the_calls_and_of_the_formula():
    from ds_wsi.compression.selection import kept
    from ds_wsi.compression.wire import cheapest, message_bytes, section_bytes

    ranks = run_ranks(each(counted), 2, ("ddp", "ddp topk", "zero1", "zero2"))
    for by_engine in ranks:
        row = by_engine["ddp topk"]
        d, nnz = row["numel"], kept(row["numel"], KEEP)
        assert row["push"] == message_bytes([section_bytes(cheapest("fp32", d, nnz), "fp32", d, nnz)])
        assert row["messages"] == 2
        assert row["count"] == row["push"] + 8
    for engine in ("ddp", "zero1", "zero2"):
        rows = [by_engine[engine] for by_engine in ranks]
        assert sum(row["count"] for row in rows) == sum(row["sent"] for row in rows), engine
        assert sum(row["sent"] for row in rows) < 2 * 4 * rows[0]["numel"], "fewer than a dense step's"


def test_the_pull_is_in_the_place_of_the_all_gather():
    missing = next(missing_seams("deepspeed", "pull"), None)
    if missing is not None:  # test_seams.py holds newer versions to the table
        pytest.skip(f"the installed DeepSpeed has no {missing.leaf}: dmgc pulls means of gradients")
    for by_engine in run_ranks(each(counted), 2, ("zero1", "zero2", "zero1 topk")):
        assert by_engine["zero1"]["gathers"] == by_engine["zero2"]["gathers"] == 0
        assert by_engine["zero1 topk"]["gathers"] >= 2 * by_engine["zero1"]["numel"], (
            "without a pull weights are gathered"
        )


# --- resume ---


def resumed(engine, folder):
    """Weights of 4 steps, of 2 + 2 with a checkpoint between, and of that without the hook's state."""
    hook = HOOKS[engine]
    whole, _ = trained(engine, hook, keep=KEEP, steps=4, optimizer="Adam")
    first = Trainer(engine, optimizer="Adam")
    handle = register(first, hook, KEEP)
    for _ in range(2):
        first.step()
    at = f"{folder}/{engine}"
    handle.save(at)
    if engine in ZERO:
        first.model.save_checkpoint(at, tag="t")
    else:
        kept = first.model.state_dict(), first.optimizer.state_dict()
    weights = {"whole": whole}
    for name in ("resumed", "forgetful"):
        second = Trainer(engine, optimizer="Adam")
        again = register(second, hook, KEEP)
        if engine in ZERO:
            second.model.load_checkpoint(at, tag="t")
        else:
            second.model.load_state_dict(kept[0])
            second.optimizer.load_state_dict(kept[1])
        dist.barrier()
        if name == "resumed":
            again.load(at)
        second.number = 2
        for _ in range(2):
            second.step()
        weights[name] = second.weights()
    return weights


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    ranks = run_ranks(each(partial(resumed, folder=str(tmp_path))), 2, ENGINES)
    for engine in ENGINES:
        one, two = (by_engine[engine] for by_engine in ranks)
        assert torch.equal(one["whole"], two["whole"]), f"{engine}: ranks differ"
        assert torch.equal(one["resumed"], one["whole"]), engine
        assert not torch.equal(one["forgetful"], one["whole"]), f"{engine}: the state makes no difference"


def saved(folder):
    trainer = Trainer("ddp")
    handle = register(trainer, "topk", KEEP)
    trainer.step()
    handle.save(folder)
    return handle.state_dict()


def loaded(folder):
    trainer = Trainer("zero2")  # names and sizes are the same under every engine
    handle = register(trainer, "topk", KEEP)
    handle.load(folder)
    trainer.step()
    return {"step": handle.state.step}


def loaded_only(folder):
    handle = register(Trainer("ddp"), "topk", KEEP)
    handle.load(folder)
    return handle.state_dict()


@pytest.mark.parametrize(("old", "new"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_goes_on_with_the_mean_of_the_residuals(old, new, tmp_path):
    states = run_ranks(saved, old, str(tmp_path))
    for results in run_ranks(loaded_only, new, str(tmp_path)):
        for name, tensor in results.items():
            mean = torch.stack([state[name].double() for state in states]).mean(0)
            torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-9)
    for results in run_ranks(loaded, new, str(tmp_path)):
        assert results["step"] == 1


def test_a_missing_or_torn_set_of_states_is_refused(tmp_path):
    run_ranks(saved, 2, str(tmp_path))
    (tmp_path / "comm_hook-00001-of-00002.safetensors").unlink()
    assert "state of every rank, got 1 files" in run_ranks(partial(first_error_of_load), 1, str(tmp_path))[0]


def first_error_of_load(folder):
    return first_error(lambda: loaded_only(folder))
