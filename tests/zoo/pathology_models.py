"""Models in the shape of pathology encoders: the arguments that their authors publish, with less depth, width and size.

No weights, and no claim about theirs: what is tried is the code that computes them.
"""

from functools import partial
from typing import Any

import timm
import torch
from timm.layers import SwiGLUPacked
from torch import Tensor, nn

from .entry import ZooModel

SMALL = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 4, "num_classes": 0}
GATED = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}


class ClassAndMean(nn.Module):
    """An encoder's class token beside the mean of its patches, as Virchow, H0-mini and Midnight are used.

    Args:
        encoder: gives all tokens [N, T, C], or a ModelOutput that holds them.
        prefix: tokens before the patches.
    """

    def __init__(self, encoder: nn.Module, prefix: int) -> None:
        super().__init__()
        self.encoder, self.prefix = encoder, prefix

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.encoder(x)
        tokens = tokens if isinstance(tokens, Tensor) else tokens.last_hidden_state
        return torch.cat([tokens[:, 0], tokens[:, self.prefix :].mean(1)], dim=-1)


class FirstToken(nn.Module):
    """The class token of a transformers encoder, as Phikon's users take it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(pixel_values=x).last_hidden_state[:, 0]


class ConvStem(nn.Module):
    """CTransPath's stem: two strided convolutions with BatchNorm, then one to the embedding.

    It checks its input's size in Python.
    """

    def __init__(self, img_size: int, patch_size: int = 4, in_chans: int = 3, embed_dim: int = 16, **_: Any) -> None:
        super().__init__()
        self.img_size, self.patch_size = (img_size, img_size), (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        layers: list[nn.Module] = []
        channels = in_chans
        for width in (embed_dim // 8, embed_dim // 4):
            layers += [nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        self.proj = nn.Sequential(*layers, nn.Conv2d(channels, embed_dim, 1))
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        _, _, height, width = x.shape
        assert height == self.img_size[0] and width == self.img_size[1], f"input size {height}x{width}"  # noqa: PT018
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class StemTokens(ConvStem):
    """The same stem before a ViT: tokens [N, T, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(1, 2)


def _vit(name: str, prefix: int, options: dict[str, Any], draws: bool) -> nn.Module:
    rates = {"drop_path_rate": 0.2, "proj_drop_rate": 0.1} if draws else {}
    encoder = timm.create_model(name, **{**SMALL, **options}, **rates)
    return ClassAndMean(encoder, prefix) if prefix else encoder


def _swin_with_stem(draws: bool) -> nn.Module:
    encoder = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=64,
        window_size=4,
        embed_dim=32,
        depths=(2, 2),
        num_heads=(2, 4),
        num_classes=0,
        drop_path_rate=0.2 if draws else 0.0,
    )
    encoder.patch_embed = ConvStem(64, embed_dim=32)
    return encoder


def _vit_with_stem(draws: bool) -> nn.Module:
    rates = {"drop_path_rate": 0.2} if draws else {}
    encoder = timm.create_model("vit_small_patch16_224", **{**SMALL, "patch_size": 4, "embed_dim": 32}, **rates)
    encoder.patch_embed = StemTokens(32, embed_dim=32)
    return encoder


def _transformers(kind: str, options: dict[str, Any], prefix: int, draws: bool) -> nn.Module:
    import transformers

    rate = 0.1 if draws else 0.0
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    config = getattr(transformers, f"{kind}Config")(**sizes, hidden_dropout_prob=rate, **options)
    pooling = {"add_pooling_layer": False} if kind == "ViT" else {}
    encoder = getattr(transformers, f"{kind}Model")(config, **pooling)
    return ClassAndMean(encoder, prefix) if prefix else FirstToken(encoder)


def _convolutional(name: str, options: dict[str, Any], draws: bool) -> nn.Module:
    rates = {"drop_rate": 0.2} if draws else {}
    return timm.create_model(name, num_classes=0, **options, **rates)


# encoder, timm's model that it is published as, tokens before the patches where class and mean are taken, arguments
VITS: list[tuple[str, str, int, dict[str, Any]]] = [
    ("UNI", "vit_large_patch16_224", 0, {"init_values": 1e-5, "dynamic_img_size": True}),
    (
        "UNI2-h",
        "vit_giant_patch14_224",
        0,
        {
            **GATED,
            "init_values": 1e-5,
            "mlp_ratio": 2.66667 * 2,
            "no_embed_class": True,
            "reg_tokens": 8,
            "dynamic_img_size": True,
        },
    ),
    (
        "Virchow",
        "vit_huge_patch14_224",
        1,
        {**GATED, "init_values": 1e-5, "mlp_ratio": 5.3375, "global_pool": "", "dynamic_img_size": True},
    ),
    (
        "Virchow2",
        "vit_huge_patch14_224",
        5,
        {
            **GATED,
            "init_values": 1e-5,
            "reg_tokens": 4,
            "mlp_ratio": 5.3375,
            "global_pool": "",
            "dynamic_img_size": True,
        },
    ),
    ("GigaPath", "vit_giant_patch14_dinov2", 0, {"mlp_ratio": 5.33334}),
    ("H-optimus-0", "vit_giant_patch14_reg4_dinov2", 0, {"init_values": 1e-5, "dynamic_img_size": False}),
    (
        "H0-mini",
        "vit_base_patch14_reg4_dinov2",
        5,
        {**GATED, "init_values": 1e-5, "mlp_ratio": 5.33334, "global_pool": ""},
    ),
    ("Kaiko ViT-S", "vit_small_patch16_224", 0, {"dynamic_img_size": True}),
    ("Kaiko ViT-L", "vit_large_patch14_reg4_dinov2", 0, {"dynamic_img_size": True}),
    ("Lunit ViT-S", "vit_small_patch8_224", 0, {}),
]

CONVOLUTIONAL: list[tuple[str, str, dict[str, Any]]] = [
    ("Lunit ResNet-50", "resnet50", {"layers": (1, 1, 2, 1)}),
    ("KimiaNet DenseNet-121", "densenet121", {"block_config": (2, 2, 4, 2), "growth_rate": 16}),
]


def models() -> list[ZooModel]:
    """The encoders' shapes."""
    entries = [
        ZooModel(f"pathology/{key}", partial(_vit, name, prefix, options), (3, 32, 32))
        for key, name, prefix, options in VITS
    ]
    entries += [
        ZooModel(f"pathology/{key}", partial(_convolutional, name, options), (3, 64, 64), (3, 133, 64))
        for key, name, options in CONVOLUTIONAL
    ]
    gated = {"use_swiglu_ffn": True, "mlp_ratio": 4}
    entries += [
        ZooModel("pathology/Phikon", partial(_transformers, "ViT", {"intermediate_size": 96}, 0), (3, 32, 32)),
        ZooModel("pathology/Phikon-v2", partial(_transformers, "Dinov2", {"mlp_ratio": 4}, 0), (3, 32, 32)),
        ZooModel("pathology/Midnight", partial(_transformers, "Dinov2", gated, 1), (3, 32, 32)),
        ZooModel("pathology/Hibou", partial(_transformers, "Dinov2WithRegisters", gated, 0), (3, 32, 32)),
        ZooModel("pathology/CTransPath", _swin_with_stem, (3, 64, 64)),
        ZooModel("pathology/ViT with the stem", _vit_with_stem, (3, 32, 32)),
    ]
    return entries
