"""The peers of the partitioned layers on the device: gradients against native's, and bytes."""

from collections.abc import Callable

import timm
import torch
from torch import nn

from ds_wsi.runtime.memory import device_peaks
from launch.benchmarks import peers
from simulated_cuda.cases import report

DEVICE = torch.device("cuda")


def resnet() -> nn.Module:
    """A ResNet of eight blocks, with BatchNorm in training mode."""
    return timm.create_model("resnet18", num_classes=0, channels=(16,) * 4, zero_init_last=False).train()


def vit() -> nn.Module:
    """A timm ViT of six blocks."""
    sizes = {"embed_dim": 32, "num_heads": 2, "depth": 6, "img_size": 64, "patch_size": 8}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes).train()


def of_transformers() -> nn.Module:
    """A ViT of Transformers, as large."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 6, "intermediate_size": 128}
    return peers.TransformersViT(**sizes, image_size=64, patch_size=8).train()


CASES: tuple[tuple[Callable[[], nn.Module], tuple[Callable[[nn.Module], peers.Forward], ...]], ...] = (
    (resnet, (peers.deepspeed_cpu_checkpointing, peers.accelerate_offload)),
    (vit, (peers.save_on_cpu, peers.deepspeed_cpu_checkpointing, peers.accelerate_offload)),
    (of_transformers, (peers.deepspeed_cpu_checkpointing, peers.transformers_checkpointing)),
)


def step(encoder: nn.Module, forward: peers.Forward, images: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """Gradients, and the bytes that the step took at most; the second of two steps, where copies meet old ones."""
    for _ in range(2):
        encoder.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward(images).square().mean().backward()
        torch.cuda.synchronize()
    peak = device_peaks(DEVICE).active - before
    return [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None], peak


def main() -> None:
    """Each peer's largest difference from native's gradients over their largest, and its bytes over native's."""
    results: dict[str, dict[str, float]] = {}
    for build, tried in CASES:
        torch.manual_seed(0)
        encoder = build().to(DEVICE)
        images = torch.randn(8, 3, 64, 64, device=DEVICE)
        expected, native = step(encoder, peers.native(encoder), images)
        for peer in tried:
            gradients, peak = step(encoder, peer(encoder), images)
            largest = torch.stack([gradient.abs().max() for gradient in expected]).max()
            pairs = zip(gradients, expected, strict=True)
            difference = torch.stack([(one - two).abs().max() for one, two in pairs]).max() / largest
            results[f"{build.__name__}, {peer.__name__}"] = {"difference": float(difference), "bytes": peak / native}
    report(results)


if __name__ == "__main__":
    main()
