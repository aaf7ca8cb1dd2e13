"""A partitioned encoder trains as the plain one under every engine, and across ranks with SyncBatchNorm.

The reference is the same engine on the unpartitioned model: weights after the steps (with plain SGD the gradients, but
for the learning rate) and the running statistics of each rank.
"""

import pytest
import torch
import torch.distributed as dist
from partition_rank_cases import (
    CHUNK,
    SYNC_CASES,
    Collectives,
    loss_of,
    make_model,
    step_on,
    synchronised_error,
    synchronised_step,
    through_accelerate,
    train,
    train_cases,
)
from torch import nn

from ds_wsi.partition import PartitionPolicy, partition_layers
from ds_wsi.partition.graph.norm import NormSite
from ds_wsi.partition.policy import MODES
from harness import run_ranks

pytestmark = pytest.mark.distributed
PLAIN = {"mode": None, "accumulation": 1, "precision": "no", "dtype": "float64", "optimizer": "sgd", "offload": False}
ENGINES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")


def settings_of(engine, offload=False):
    """(settings, modes) to compare with the plain model under an engine: one micro-step, accumulation, bf16."""
    # DeepSpeed reduces no float64 at stage 0; at 1 to 3 its weights, and the step, are float32.
    plain = PLAIN | {"engine": engine, "offload": offload, "dtype": "float32" if engine == "zero0" else "float64"}
    # Adam turns the rounding of gradients that are zero (of a bias before a norm) into steps: not in float32.
    accumulated = plain | {"accumulation": 2, "optimizer": "sgd" if engine == "zero0" else "adam"}
    autocast = plain | {"precision": "bf16", "dtype": "float32"}
    if offload:
        return [(plain, ("lean",)), (accumulated, ("recompute",))]
    settings = [
        (plain, (*MODES, "native") if engine in ("ddp", "fsdp2", "zero3") else ("lean", "recompute", "offload"))
    ]
    settings += [
        (accumulated, ("lean", "recompute")),
        (autocast, ("lean", "recompute") if engine == "ddp" else ("lean",)),
    ]
    if engine in ("fsdp2", "zero3"):
        settings.append((plain | {"called_before": True}, ("lean",)))
    return settings


def distance(ours, theirs):
    """(parameters, running statistics): the largest difference, relative to the largest update and to the largest."""
    start = make_model(torch.float64)
    names = [name for name, _ in start.named_parameters()]
    start = start.state_dict()
    update = max((theirs[name].double() - start[name]).abs().max() for name in names)
    weights = max((ours[name].double() - theirs[name].double()).abs().max() for name in names) / update
    statistics = max(
        (ours[name].double() - theirs[name].double()).abs().max() / theirs[name].abs().max()
        for name in theirs
        if "running" in name
    )
    return weights.item(), statistics.item()


# Relative to the largest update, and to the largest running statistic.
TOLERANCES = {"float64": (1e-10, 1e-10), "float32": (2e-5, 2e-6)}
ADAM_TOLERANCES = (1e-7, 1e-8)  # it divides gradients of 1e-10 by their own size
BF16_TOLERANCES = (2e-2, 1e-3)  # a rounding is 4e-3


def cases_of(groups):
    return [case for plain, modes in groups for case in (plain, *(plain | {"mode": mode} for mode in modes))]


def assert_trained_as_plain(groups, results):
    """The results of one rank are those of plain training."""
    results = iter(results)
    exact = []
    for plain, modes in groups:
        reference = next(results)
        if (plain["precision"], plain["accumulation"]) == ("no", 1):
            exact = reference
        allowed = ADAM_TOLERANCES if plain["optimizer"] == "adam" else TOLERANCES[plain["dtype"]]
        allowed = BF16_TOLERANCES if plain["precision"] == "bf16" else allowed
        for mode in modes:
            for step, (state, plain_state) in enumerate(zip(next(results), reference, strict=True)):
                case = plain | {"mode": mode, "step": step}
                counts = {name: state[name] for name in state if "num_batches" in name}
                assert all(torch.equal(count, plain_state[name]) for name, count in counts.items()), case
                weights, statistics = distance(state, plain_state)
                assert weights <= allowed[0], (weights, case)
                assert statistics <= allowed[1], (statistics, case)
                if plain["precision"] == "bf16":  # the same roundings, of other sums: as near to the exact step
                    pairs = zip(distance(state, exact[step]), distance(plain_state, exact[step]), strict=True)
                    assert all(one <= 1.2 * other for one, other in pairs), case
    assert next(results, None) is None


GROUPS = [group for engine in ENGINES for group in settings_of(engine)]
GROUPS += [group for engine in ("zero1", "zero2", "zero3") for group in settings_of(engine, offload=True)]


def on_two_ranks():
    """Everything that needs two ranks, in one launch."""
    return {
        "trained": train_cases(cases_of(GROUPS)),
        "synchronised": [synchronised_step(*case) for case in SYNC_CASES],
        "counted": [count_in_zero3(*case) for case in COUNTED],
        "refused": refusals(),
    }


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(on_two_ranks, 2)


def test_two_ranks_train_as_the_plain_encoder_under_every_engine(ranks):
    for results in ranks:
        assert_trained_as_plain(GROUPS, results["trained"])


def train_alone(cases):
    """What `train_cases` gives, and a DDP step with a partition that leaves out the correction of norms."""
    trained = train_cases(cases)
    NormSite.correct = lambda self, statistics, z, grad: grad
    return trained, train(PLAIN | {"engine": "ddp", "mode": "lean", "check": False})


def test_one_rank_trains_as_the_plain_encoder_under_every_engine():
    groups = [(settings_of(engine)[0][0], ("lean",)) for engine in ENGINES]
    groups += [(settings_of(engine)[1][0], ("recompute",)) for engine in ENGINES]
    ((trained, wrong),) = run_ranks(train_alone, 1, cases_of(groups))
    assert_trained_as_plain(groups, trained)
    # The check sees a wrong gradient, and through it wrong statistics in the next step.
    assert distance(wrong[0], trained[0][0])[0] > 1e-2
    assert distance(wrong[1], trained[0][1])[1] > 1e-4


def refusals():
    """What is said where an engine takes the parameters apart within the partition."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import ds_wsi.engines.accelerator.engine as engine

    model = make_model(torch.float32)
    partition_layers(model.encoder, PartitionPolicy(mode="lean", chunk_size=CHUNK))
    fully_shard(model.encoder[3], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    with pytest.raises(ValueError) as shards:
        loss_of(model, 0, 0)
    engine.gather_as_one = lambda model: None
    with pytest.raises(ValueError) as zero3:
        train(PLAIN | {"engine": "zero3", "mode": "lean", "dtype": "float32"})
    return [str(shards.value), str(zero3.value)]


def test_parameters_in_shards_are_refused(ranks):
    for results in ranks:
        shards, zero3 = results["refused"]
        assert "got '3.conv1.weight' in shards. HINT: fully_shard the encoder" in shards
        assert "HINT: deepspeed.utils.set_z3_leaf_module(encoder, True)" in zero3


COUNTED = [("lean", 2), ("lean", 20), ("recompute", 2)]  # mode, tiles per chunk


def count_in_zero3(mode, chunk):
    """Collectives of the third step, and whether the encoder's parameters were freed after its forward."""
    model = make_model(torch.float32)
    partition_layers(model.encoder, PartitionPolicy(mode=mode, chunk_size=chunk))
    micro_step = through_accelerate(PLAIN | {"engine": "zero3"}, model)
    freed = []
    parameters = list(model.encoder.parameters())
    model.aggregator.register_forward_pre_hook(lambda *_: freed.append(sum(p.numel() for p in parameters) == 0))
    for index in range(3):  # DeepSpeed records the order of the modules in the first two
        with Collectives() as collectives:
            micro_step(index)
    return {**collectives.counts, "freed": sum(freed)}


def test_zero3_gathers_once_around_forward_and_backward(ranks):
    # The aggregator's four layers are gathered twice too, each.
    expected = {"_allgather_base_": 2 + 2 * 4, "_reduce_scatter_base_": 1, "allreduce_": 1, "freed": 3}
    for results in ranks:
        assert results["counted"] == [expected] * len(COUNTED)


def test_sync_batchnorm_is_one_process_on_all_bags(ranks):
    encoder = make_model(torch.float64).encoder
    expected = step_on(encoder, slice(None))
    errors = [
        synchronised_error(expected, [results["synchronised"][index] for results in ranks])
        for index in range(len(SYNC_CASES))
    ]
    for case, error in zip(SYNC_CASES[:-1], errors, strict=False):
        assert len(error) == 4
        assert max(error.values()) <= 1e-10, (case, error)
    # Norms of their own on each rank would be noticed in all four.
    assert min(errors[-1].values()) > 1e-3


def test_sync_batchnorm_communicates_once_a_norm_and_pass(ranks):
    norms = sum(isinstance(part, nn.BatchNorm2d) for part in make_model(torch.float64).encoder.modules())
    for results in ranks:
        counts = [result["collectives"] for result in results["synchronised"]]
        of_ddp = counts[-1]  # DDP's
        expected = {**of_ddp, "allgather_": norms, "allreduce_": norms + of_ddp["allreduce_"]}
        assert counts[:-1] == [expected] * (len(SYNC_CASES) - 1)
