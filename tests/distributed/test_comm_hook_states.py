"""What hooks keep between steps, what they count, what they refuse, and what is left when they go."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from test_comm_hooks import ENGINES, ZERO, Trainer, register, trained

from ds_wsi.runtime.seams import missing_seams
from harness import run_ranks

pytestmark = pytest.mark.distributed
KEEP = 0.1
HOOKS = {engine: "topk" if engine == "zero0" else "dmgc" for engine in ENGINES}


def first_error(action):
    try:
        action()
    except ValueError as error:
        return str(error)
    return "nothing was raised"


# --- what is owed ---


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
    found = run_ranks(each(owed), 2, ENGINES)[0]
    for engine, row in found.items():
        assert row["whole"], engine
        assert row["worst"] < 1e-6, (engine, row)
    ddp = found["ddp"]["buckets"]
    assert ddp[0] != ddp[1], "DDP was to rebuild its buckets, or the test proves nothing"


class each:  # noqa: N801  (a function of a function, picklable)
    """`body(engine)` of each engine, in one launch."""

    def __init__(self, body):
        self.body = body

    def __call__(self, engines):
        return {engine: self.body(engine) for engine in engines}


# --- bytes ---


def counted(engine):
    """The wire bytes of one step by the count, and by what torch.distributed was given."""
    from deepspeed import comm
    from test_compression_ranks import CountedBytes

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
    for found in ranks:
        row = found["ddp topk"]
        d, nnz = row["numel"], kept(row["numel"], KEEP)
        assert row["push"] == message_bytes([section_bytes(cheapest("fp32", d, nnz), "fp32", d, nnz)])
        assert row["messages"] == 2
        assert row["count"] == row["push"] + 8
    for engine in ("ddp", "zero1", "zero2"):
        rows = [found[engine] for found in ranks]
        assert sum(row["count"] for row in rows) == sum(row["sent"] for row in rows), engine
        assert sum(row["sent"] for row in rows) < 2 * 4 * rows[0]["numel"], "fewer than a dense step's"


def test_the_pull_is_in_the_place_of_the_all_gather():
    missing = next(missing_seams("deepspeed", "pull"), None)
    if missing is not None:  # test_seams.py holds newer versions to the table
        pytest.skip(f"the installed DeepSpeed has no {missing.leaf}: dmgc pulls means of gradients")
    for found in run_ranks(each(counted), 2, ("zero1", "zero2", "zero1 topk")):
        assert found["zero1"]["gathers"] == found["zero2"]["gathers"] == 0
        assert found["zero1 topk"]["gathers"] >= 2 * found["zero1"]["numel"], "without a pull weights are gathered"


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
    found = {"whole": whole}
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
        found[name] = second.weights()
    return found


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    ranks = run_ranks(each(partial(resumed, folder=str(tmp_path))), 2, ENGINES)
    for engine in ENGINES:
        one, two = (found[engine] for found in ranks)
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
    for found in run_ranks(loaded_only, new, str(tmp_path)):
        for name, tensor in found.items():
            mean = torch.stack([state[name].double() for state in states]).mean(0)
            torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-9)
    for found in run_ranks(loaded, new, str(tmp_path)):
        assert found["step"] == 1


def test_a_missing_or_torn_set_of_states_is_refused(tmp_path):
    run_ranks(saved, 2, str(tmp_path))
    (tmp_path / "comm_hook-00001-of-00002.safetensors").unlink()
    assert "state of every rank, got 1 files" in run_ranks(partial(first_error_of_load), 1, str(tmp_path))[0]


def first_error_of_load(folder):
    return first_error(lambda: loaded_only(folder))


# --- removal, refusals, overflow ---


def removed(engine):
    """Weights of two native steps after a removed hook, and without one ever."""
    native, _ = trained(engine, None, steps=2, accumulation=2)
    trainer = Trainer(engine, accumulation=2)
    handle = register(trainer, HOOKS[engine], KEEP)
    handle.remove()
    handle.remove()
    for _ in range(2):
        trainer.step()
    again = register(trainer, "topk", KEEP)
    second = first_error(lambda: register(trainer, "topk", KEEP))
    again.remove()
    return {"same": torch.equal(trainer.weights(), native), "second": second, "count": handle.count.wire_bytes}


def test_a_removed_hook_leaves_the_native_engine():
    for engine, row in run_ranks(each(removed), 2, ENGINES)[0].items():
        assert row["same"], engine
        assert row["count"] == 0, engine
        assert "must have one hook" in row["second"], engine


def refusals():
    from ds_wsi.compression import DMGC, TopK
    from ds_wsi.engines.comm_hooks.register import register_comm_hook

    found = {}

    def refused(name, trainer, hook="topk", state=None):
        found[name] = first_error(lambda: register_comm_hook(trainer.model, hook, state))

    zero2 = Trainer("zero2")
    refused("powersgd", zero2, "powersgd")
    refused("server", zero2, "dmgc", DMGC(topology="server", pull="weights"))
    refused("policy", zero2, "dmgc", TopK())
    refused("name", zero2, "top-k")
    refused("sharded", Trainer("zero3"), "dmgc", DMGC(pull="weights"))
    refused("sharded ddp", Trainer("ddp"), "dmgc", DMGC(pull="weights"))
    refused("contiguous", Trainer("zero2", zero={"contiguous_gradients": False}))
    zero2.model.has_moe_layers = True
    refused("moe", zero2)
    zero2 = Trainer("zero2")
    zero2.model.is_deepcompile_enabled = lambda: True
    refused("deepcompile", zero2)
    zero2 = Trainer("zero2")
    zero2.model.module.lookup = torch.nn.Embedding(2, 2, sparse=True)
    refused("sparse", zero2)
    zero2 = Trainer("zero2")
    zero2.model.zenflow = True
    refused("zenflow", zero2)
    zero2 = Trainer("zero2")
    zero2.model.optimizer.gradient_reduction_w_predivide = lambda tensor: tensor
    refused("signature", zero2)
    found["module"] = first_error(lambda: register_comm_hook(torch.nn.Linear(1, 1), "topk"))
    native = trained("zero2", None, steps=2)[0]
    zero2 = Trainer("zero2")
    refused("after", zero2, "dmgc", DMGC(topology="server", pull="weights"))
    for _ in range(2):
        zero2.step()
    found["untouched"] = torch.equal(zero2.weights(), native)
    return found


def test_what_cannot_be_served_is_refused_with_the_reason():
    found = run_ranks(refusals, 2)[0]
    words = {
        "powersgd": "must run under DDP",
        "server": "whose ranks own parts of the optimizer, got server under zero2",
        "policy": "must be a DMGC",
        "name": "must be one of allreduce",
        "sharded": "must be under ZeRO 1 or 2 with topology sharded",
        "sharded ddp": "got sharded under ddp",
        "contiguous": "contiguous_gradients must be true",
        "moe": "mixture of experts",
        "deepcompile": "DeepCompile",
        "sparse": "got an embedding's sparse ones",
        "zenflow": "got ZenFlow",
        "signature": "must take ('tensor', 'communication_data_type')",
        "module": "must be a DeepSpeedEngine, DDP or an FSDP2 module, got Linear",
    }
    for name, part in words.items():
        assert part in found[name], (name, found[name])
        assert "HINT" in found[name] or name == "policy", name
    assert found["untouched"], "a refused hook must leave the engine as it was"


def overflowed(engine):
    """fp16 with a loss scale: a step that overflows on one rank changes nothing, and residuals are in true units."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # it asks whether that is fast
    get_accelerator().supported_dtypes = lambda: [torch.float32, torch.float16, torch.bfloat16]
    trainer = Trainer(engine, fp16={"enabled": True, "initial_scale_power": 8, "hysteresis": 1})
    handle = register(trainer, "topk", KEEP)

    def step(factor=1.0):
        from test_comm_hooks import F, batch_of

        x, y = batch_of(trainer.number, dist.get_rank())
        trainer.number += 1
        trainer.model.backward(F.cross_entropy(trainer.model(x.half()).float(), y) * factor)
        trainer.model.step()

    step()
    before, weights = handle.state_dict(), trainer.weights()
    step(float("inf") if dist.get_rank() == 1 else 1.0)
    after = handle.state_dict()
    same = all(torch.equal(before[name], after[name]) for name in before)
    kept = torch.equal(trainer.weights(), weights)
    step()
    return {
        "same": same,
        "kept": kept,
        "step": handle.state_dict()["step"].item(),
        "largest": max(float(t.abs().max()) for name, t in before.items() if name != "step"),
        "moved": not torch.equal(trainer.weights(), weights),
    }


def test_an_overflowing_step_leaves_no_trace():
    for engine, row in run_ranks(each(overflowed), 2, ("zero1", "zero2", "zero3"))[0].items():
        assert row["same"], engine
        assert row["kept"], engine
        assert row["moved"], engine
        assert row["step"] == 2, engine
        assert 0 < row["largest"] < 1, (engine, row)  # times 256 it would not be


def powersgd():
    from ds_wsi.engines.comm_hooks.register import register_comm_hook

    trainer = Trainer("ddp")
    handle = register_comm_hook(trainer.model, "powersgd")
    for _ in range(13):  # its first 10 are dense
        trainer.step()
    weights = trainer.weights()
    handle.remove()
    return weights


def test_powersgd_is_torchs_under_ddp():
    one, two = run_ranks(powersgd, 2)
    assert torch.equal(one, two)
    assert torch.isfinite(one).all()


def attached():
    from test_comm_hooks import make_model, zero_config

    import ds_wsi
    from ds_wsi.compression.comm import CommPolicy

    section = {"compression": {"hook": "topk", "keep": 0.2, "dense_below": 10}}
    engine, *_ = ds_wsi.initialize(model=make_model(), config=zero_config(2, ds_wsi=section))
    policy = engine.comm_handle.state.policy
    choice = ds_wsi.attach(Trainer("zero2").model, CommPolicy(hook="auto"))
    return {
        "keep": policy.keep,
        "dense_below": policy.dense_below,
        "none": ds_wsi.attach(Trainer("zero2").model) is None,
        "auto": "none" if choice is None else choice.where,
    }


def test_the_json_section_attaches_a_hook():
    for row in run_ranks(attached, 2):
        assert (row["keep"], row["dense_below"], row["none"]) == (0.2, 10, True)
        assert row["auto"] == "none", "two processes of one machine and 500 parameters: nothing to gain"


def accelerated(folder):
    """A hook as the trainer attaches it, under Accelerate's DDP, saved and loaded with its checkpoints."""
    import json
    from pathlib import Path

    from test_comm_hooks import F, batch_of, make_model

    from ds_wsi.compression.comm import CommPolicy
    from ds_wsi.engines.accelerator.engine import attach_hook
    from ds_wsi.engines.accelerator.stepper import Stepper
    from ds_wsi.training.checkpoint import Contents, save_checkpoint
    from ds_wsi.training.saver import Saver

    def stepper():
        made = Stepper("ddp", make_model(), "sgd", 0.1)
        return made, attach_hook(made._accelerator, made.model, CommPolicy(hook="dmgc", keep=KEEP))

    def steps(made, numbers):
        for number in numbers:
            x, y = batch_of(number, dist.get_rank())
            made.backward(F.cross_entropy(made.model(x), y))
            made.step()

    first, handle = stepper()
    steps(first, range(2))
    with Saver() as saver:
        saver.make_room()
        contents = Contents({"at": 2}, {}, handle.on_host())
        checkpoint = save_checkpoint(saver, first._accelerator, Path(folder), 2, contents, 2)
        kept = first.model.state_dict()
        kept = {name: value.clone() for name, value in kept.items()}
    dist.barrier()
    steps(first, range(2, 4))
    second, again = stepper()
    second.model.load_state_dict(kept)
    again.load(checkpoint)
    state = json.loads((checkpoint / "state.json").read_text())
    steps(second, range(2, 4))
    one, two = first.parameters(), second.parameters()
    return {
        "same": all(torch.equal(one[name], two[name]) for name in one),
        "state": state["at"],
        "metrics": sorted(handle.metrics()),
        "listed": "comm_hook-00001-of-00002" in (checkpoint / "files.json").read_text(),
    }


def test_the_trainers_checkpoints_hold_the_hooks_state(tmp_path):
    for row in run_ranks(accelerated, 2, str(tmp_path)):
        assert row["same"]
        assert row["listed"]
        assert row["state"] == 2
        assert row["metrics"] == [
            f"comm/{way}_{what}" for way in ("pull", "push") for what in ("message_ratio", "wire_bytes")
        ]


def accumulated():
    """Three micro-steps a step through Accelerate's own accumulation under ZeRO 2: messages of three steps."""
    from pathlib import Path

    from accelerate.state import AcceleratorState, GradientState
    from test_comm_hooks import F, batch_of, make_model, zero_config

    from ds_wsi.compression.comm import CommPolicy
    from ds_wsi.engines.accelerator.engine import EngineSettings, attach_hook, build_accelerator, prepare

    found = {}
    for hook in ("none", "dmgc"):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        settings = EngineSettings(0.1, 0.0, 0.0, "sgd", 1, 3)
        config = zero_config(2, train_micro_batch_size_per_gpu="auto") | {"gradient_accumulation_steps": "auto"}
        accelerator = build_accelerator(settings, Path("unused"), config)
        model, _ = prepare(accelerator, make_model(), settings)
        handle = attach_hook(accelerator, model, CommPolicy(hook=hook, keep=1.0))
        for number in range(9):
            with accelerator.accumulate(model):
                x, y = batch_of(number, dist.get_rank())
                accelerator.backward(F.cross_entropy(model(x), y))
        found[hook] = torch.cat([p.detach().flatten().clone() for p in accelerator.unwrap_model(model).parameters()])
    coalesces = hasattr(model, "coalesce_grad_reduction")
    return {
        **found,
        "coalesces": coalesces,
        "messages": len(handle.count.push.messages),
        "step": handle.state_dict()["step"].item(),
    }


def test_accelerates_accumulation_sends_once_a_step():
    for row in run_ranks(accumulated, 2):
        torch.testing.assert_close(row["dmgc"], row["none"], rtol=0, atol=1e-6)  # another order of the same sum
        # Before there was `coalesce_grad_reduction` ZeRO 2 reduced in each micro-step, of which a step has three.
        assert row["messages"] == 3 * 2 * (1 if row["coalesces"] else 3), "two buckets a step"
        assert row["step"] == 3
