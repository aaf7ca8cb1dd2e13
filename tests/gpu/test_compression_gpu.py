"""Compression on a CUDA device selects, sends and adds what it does on a CPU."""

import pytest
import torch
import torch.distributed as dist

from ds_wsi.compression import DMGC, Bucket, Cast, Compressor, hook
from ds_wsi.compression.topk import top_k

pytestmark = pytest.mark.gpu
D = 300_007


def test_the_selection_is_the_cpus():
    x = (torch.randn(D, generator=torch.Generator().manual_seed(0)) * 4).round()  # many ties
    x[7], x[9] = float("inf"), float("nan")
    for k in (1, 300, 3000, 100_000, D):
        assert torch.equal(top_k(x.cuda(), k).cpu(), top_k(x, k))


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_the_hook_is_the_cpus(backend, tmp_path):
    gradients = [torch.randn(D, generator=torch.Generator().manual_seed(step)) for step in range(3)]

    def means(device):
        return [
            hook(state, Bucket(gradient.to(device), ("a", "b"), (D - 5, 5))).cpu()
            for state in (
                Compressor(DMGC(topology=route, values="fp16")) for route in ("all_gather", "sharded", "server")
            )
            for gradient in gradients
        ]

    def alone(name, device):
        dist.init_process_group(name, store=dist.FileStore(str(tmp_path / name), 1), rank=0, world_size=1)
        try:
            return means(device), hook(Compressor(Cast()), Bucket(gradients[0].to(device), ("a",), (D,))).cpu()
        finally:
            dist.destroy_process_group()

    expected, cast = alone("gloo", "cpu")
    (tmp_path / "gloo").unlink(missing_ok=True)
    on_device, cast_on_device = alone(backend, "cuda")
    assert all(torch.equal(one, two) for one, two in zip(on_device, expected, strict=True))
    assert torch.equal(cast_on_device, cast)
