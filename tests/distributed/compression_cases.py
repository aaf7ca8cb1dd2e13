"""Compressed exchanges that run on every rank, and what they are asked for."""

import pytest
import torch
import torch.distributed as dist

from ds_wsi.compression import DMGC, Bucket, Cast, Compressor, KeepSchedule, TopK, hook, pull_weights, push
from ds_wsi.compression.exchange import even_bounds

WORLDS = (1, 2, 4)
NAMES, NUMELS = ("conv", "bias", "head"), (300, 7, 94)
D, STEPS, RATE = sum(NUMELS), 4, 0.05
POLICIES = {
    f"{route} {keep} {values} {below}": DMGC(keep=keep, values=values, dense_below=below, topology=route)
    for route in ("all_gather", "sharded", "server")
    for keep, values, below in ((1.0, "fp32", 0), (0.05, "fp32", 0), (0.05, "fp16", 10), (0.05, "bf16", 0))
}
POLICIES["wider pull"] = DMGC(keep=0.05, pull_keep=0.2)
POLICIES["whole pull"] = DMGC(keep=0.05, values="bf16", pull_keep=1.0)
POLICIES["top-k"] = TopK(keep=0.05, values="fp16", dense_below=10)
POLICIES["warm-up"] = DMGC(keep=0.02, schedule=KeepSchedule(dense_steps=1, stage_steps=1, stages=(0.45, 0.1)))
MOMENTUM = DMGC(keep=0.05, momentum=0.5, clip_norm=5.0, dense_below=10)
PULLS = {
    name: policy for name, policy in POLICIES.items() if isinstance(policy, DMGC) and policy.topology != "all_gather"
}
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def gradient_of(step, rank):
    return torch.randn(D, generator=torch.Generator().manual_seed(100 * step + rank))


def start():
    return torch.randn(D, generator=torch.Generator().manual_seed(9))


def bucket_of(flat, group=None):
    return Bucket(flat, NAMES, NUMELS, group)


class CountedBytes:
    """Bytes that leave this rank in torch.distributed's calls, and that arrive, by call; announcements apart."""

    def __enter__(self):
        self.sent = self.received = self.announced = 0
        self.kept = dist.all_to_all_single, dist.broadcast
        rank, world = dist.get_rank(), dist.get_world_size()

        def all_to_all(output, given, received=None, sizes=None, **kw):
            if sizes is None:
                self.announced += given.nbytes // world * (world - 1)
                return self.kept[0](output, given, **kw)
            self.sent += sum(sizes) - sizes[rank]
            self.received += sum(received) - received[rank]
            assert (sum(sizes), sum(received)) == (given.nbytes, output.nbytes)
            return self.kept[0](output, given, received, sizes, **kw)

        def broadcast(tensor, source, **kw):
            if source == rank:
                self.sent += tensor.nbytes * (world - 1)
            else:
                self.received += tensor.nbytes
            return self.kept[1](tensor, source, **kw)

        dist.all_to_all_single, dist.broadcast = all_to_all, broadcast
        return self

    def __exit__(self, *_):
        dist.all_to_all_single, dist.broadcast = self.kept


def count_of(state):
    count = state.count
    return {
        way: {
            "messages": [size for size, _ in getattr(count, way).messages],
            "dense": [size for _, size in getattr(count, way).messages],
            "wire": getattr(count, way).wire_bytes,
            "by_tensor": dict(getattr(count, way).by_tensor),
        }
        for way in ("push", "pull")
    }


def hooked(policy, rank):
    state, means = Compressor(policy), []
    with CountedBytes() as counted:
        for step in range(STEPS):
            gradient = gradient_of(step, rank)
            means.append(hook(state, bucket_of(gradient)))
            assert torch.equal(gradient, gradient_of(step, rank)), "the bucket must not change"
            state.next_step()
    calls = {"sent": counted.sent, "received": counted.received, "announced": counted.announced}
    return {"means": means, "state": state.state_dict(), "count": count_of(state), "calls": calls}


def pulled(policy, rank):
    """SGD at the owners; the replica after each step."""
    state, replica, world = Compressor(policy), start(), dist.get_world_size()
    bounds = even_bounds(D, world) if policy.topology == "sharded" else (0, *[D] * world)
    owned, replicas = replica[bounds[rank] : bounds[rank + 1]].clone(), []
    with CountedBytes() as counted:
        for step in range(STEPS):
            shard = push(state, bucket_of(gradient_of(step, rank)))
            assert (shard.start, shard.stop) == bounds[rank : rank + 2]
            owned -= RATE * shard.values
            pull_weights(state, owned, bucket_of(replica))
            replicas.append(replica.clone())
            state.next_step()
    calls = {"sent": counted.sent, "received": counted.received, "announced": counted.announced}
    return {"replicas": replicas, "count": count_of(state), "calls": calls}


def overflowed(policy, rank):
    """Steps 0 and 2 of three: at step 1 the last rank's gradient is not finite."""
    state, means = Compressor(policy), []
    for step in range(3):
        gradient = gradient_of(step, rank)
        if step == 1 and rank == dist.get_world_size() - 1:
            gradient[D // 2] = float("nan")
        before = state.state_dict()
        means.append(hook(state, bucket_of(gradient)))
        if step == 1:
            assert all(torch.equal(before[name], tensor) for name, tensor in state.state_dict().items())
    return means


BEYOND = 3e5  # multiples of a gradient of one: some values are beyond 65504, in some shards of some ranks


def beyond(dtype, rank):
    """Means of gradients that float16 does not hold; at step 1 the last rank's is not finite."""
    state, results = Compressor(Cast(dtype)), []
    for step in range(3):
        gradient = gradient_of(step, rank)
        if step != 2:
            gradient[D // 4 :] *= BEYOND * (1 + rank)
        if step == 1 and rank == dist.get_world_size() - 1:
            gradient[3], gradient[-1] = float("inf"), float("nan")
        results.append(hook(state, bucket_of(gradient)))
        state.next_step()
        results.append(state.divided)
    return results


def resumed(policy, rank):
    state, means = Compressor(policy), []
    for step in range(STEPS):
        saved, state = state.state_dict(), Compressor(policy)
        state.load_state_dict(saved)
        means.append(hook(state, bucket_of(gradient_of(step, rank))))
        state.next_step()
    return means


def of_two_groups(rank, world):
    """Even and odd ranks apart."""
    groups = [dist.new_group(list(range(parity, world, 2))) for parity in range(min(2, world))]
    group = groups[rank % 2]
    means = [
        hook(Compressor(DMGC(keep=0.05, topology=route)), bucket_of(gradient_of(0, rank), group))
        for route in ("all_gather", "sharded", "server")
    ]
    return [*means, hook(Compressor(Cast(torch.float32)), bucket_of(gradient_of(0, rank), group))]


def refusals(rank):
    state, world = Compressor(DMGC()), dist.get_world_size()
    owned = torch.zeros(even_bounds(D, world)[rank + 1] - even_bounds(D, world)[rank])
    replica, said = start(), []
    for call in (
        lambda: pull_weights(Compressor(TopK()), owned, bucket_of(replica)),
        lambda: push(Compressor(Cast()), bucket_of(replica)),
        lambda: push(state, bucket_of(replica), bounds=(0, *[D + 1] * world)),
        lambda: pull_weights(state, owned.double(), bucket_of(replica)),
        lambda: pull_weights(state, torch.full_like(owned, float("inf")), bucket_of(replica)),
    ):
        with pytest.raises(ValueError) as error:
            call()
        said.append(str(error.value))
    assert torch.equal(replica, start())
    return said


def odd_buckets(rank):
    """A bucket without entries, one of bf16, one with more ranks than entries; by topology."""
    results = []
    for route in ("all_gather", "sharded", "server"):
        empty = hook(Compressor(DMGC(topology=route)), Bucket(torch.zeros(0), (), ()))
        half = hook(Compressor(DMGC(topology=route)), bucket_of(gradient_of(0, rank).bfloat16()))
        tiny = Bucket(torch.tensor([1.0 + rank, 0.5]), ("empty", "tiny"), (0, 2))
        results.append([empty, half, hook(Compressor(DMGC(topology=route)), tiny)])
    return results


def jump(rank, world):
    """Weights far below the replica's: theta_hat + (theta - theta_hat) would not be theta."""
    replica, bounds = start(), even_bounds(D, world)
    owned = 1e-4 * gradient_of(0, 0)[bounds[rank] : bounds[rank + 1]]
    pull_weights(Compressor(DMGC(keep=1.0)), owned, bucket_of(replica))
    return replica


def least_squares(rank, world):
    """Loss, relative to the start's, of SGD on all ranks' rows with 5 % pushed and pulled."""
    generator = torch.Generator().manual_seed(3)
    x, truth = torch.randn(4 * D, D, generator=generator), torch.randn(D, generator=generator)
    mine, replica = x[rank::world], torch.zeros(D)
    state, bounds = Compressor(DMGC(keep=0.05, values="fp16")), even_bounds(D, world)
    owned = replica[bounds[rank] : bounds[rank + 1]].clone()
    for _ in range(200):
        gradient = mine.T @ (mine @ (replica - truth)) / len(mine)
        owned -= 0.03 * push(state, bucket_of(gradient)).values
        pull_weights(state, owned, bucket_of(replica))
        state.next_step()
    return ((x @ (replica - truth)) ** 2).mean().item() / ((x @ truth) ** 2).mean().item()


def own_bounds(rank, world):
    """Shards that an engine has cut: all but the first 10 entries are the last rank's."""
    bounds = (0, *[10] * (world - 1), D)
    shard = push(Compressor(DMGC(keep=0.05)), bucket_of(gradient_of(0, rank)), bounds)
    return {"start": shard.start, "values": shard.values}


def on_every_rank():
    rank, world = dist.get_rank(), dist.get_world_size()
    reduced = gradient_of(0, rank)
    dist.all_reduce(reduced)
    return {
        "hooked": {name: hooked(policy, rank) for name, policy in POLICIES.items()},
        "pulled": {name: pulled(policy, rank) for name, policy in PULLS.items()},
        "cast": {name: hooked(Cast(dtype), rank) for name, dtype in TYPES.items()},
        "beyond": {name: beyond(TYPES[name], rank) for name in ("fp16", "bf16")},
        "overflowed": {name: overflowed(POLICIES[name], rank) for name in ("top-k", "sharded 0.05 fp16 10")},
        "resumed": {name: resumed(POLICIES[name], rank) for name in ("top-k", "warm-up", "server 0.05 bf16 0")},
        "momentum": hooked(MOMENTUM, rank)["means"],
        "momentum resumed": resumed(MOMENTUM, rank),
        "groups": of_two_groups(rank, world),
        "refused": refusals(rank),
        "bounds": own_bounds(rank, world),
        "odd": odd_buckets(rank),
        "jump": jump(rank, world),
        "loss": least_squares(rank, world),
        "reduced": reduced / world,
    }
