"""torchvision: one model of every model file that classifies, segments or reads video.

Left out: detection, which takes lists of images and their boxes; optical flow, which takes two; quantized models, which
are not trained.
"""

from functools import partial
from typing import Any

import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck
from torchvision.models.segmentation.fcn import FCNHead

from .entry import ZooModel

SMALL_SWIN = {
    "patch_size": [4, 4],
    "embed_dim": 16,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 4, 8],
    "window_size": [4, 4],
}

MAXVIT = {
    "input_size": (64, 64),
    "stem_channels": 8,
    "partition_size": 2,
    "block_channels": [8, 16],
    "block_layers": [1, 1],
    "head_dim": 8,
    "stochastic_depth_prob": 0.2,
    "num_classes": 10,
}

# name, shape of a tile, whether rows of a large image can be tried, arguments
ROWS: list[tuple[str, tuple[int, ...], bool, dict[str, Any]]] = [
    ("alexnet", (3, 64, 64), True, {}),
    ("convnext_tiny", (3, 32, 32), True, {}),
    ("densenet121", (3, 64, 64), True, {}),
    ("efficientnet_b0", (3, 64, 64), True, {}),
    ("efficientnet_v2_s", (3, 32, 32), True, {}),
    ("googlenet", (3, 64, 64), True, {"aux_logits": False, "init_weights": False}),
    ("inception_v3", (3, 80, 80), True, {"aux_logits": False, "init_weights": False}),
    ("MaxVit", (3, 64, 64), False, MAXVIT),
    ("mnasnet0_5", (3, 64, 64), True, {}),
    ("mobilenet_v2", (3, 64, 64), True, {}),
    ("mobilenet_v3_small", (3, 64, 64), True, {}),
    ("regnet_x_400mf", (3, 64, 64), True, {}),
    ("regnet_y_400mf", (3, 64, 64), True, {}),
    ("resnet18", (3, 64, 64), True, {}),
    ("ResNet", (3, 64, 64), True, {"block": Bottleneck, "layers": [1, 1, 2, 1]}),
    (
        "ResNet of groups",
        (3, 64, 64),
        True,
        {"block": Bottleneck, "layers": [1, 1, 2, 1], "groups": 8, "width_per_group": 4},
    ),
    ("shufflenet_v2_x0_5", (3, 64, 64), True, {}),
    ("squeezenet1_1", (3, 64, 64), True, {}),
    ("vgg11_bn", (3, 32, 32), True, {}),
    ("SwinTransformer", (3, 64, 64), False, SMALL_SWIN),
    ("SwinTransformer v2", (3, 64, 64), False, SMALL_SWIN),
    (
        "VisionTransformer",
        (3, 32, 32),
        False,
        {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 48, "mlp_dim": 96},
    ),
    ("segmentation.FCN", (3, 64, 64), False, {}),
    ("segmentation.deeplabv3_mobilenet_v3_large", (3, 32, 32), False, {"weights_backbone": None}),
    ("segmentation.lraspp_mobilenet_v3_large", (3, 64, 64), False, {"weights_backbone": None}),
    ("video.r3d_18", (3, 4, 16, 16), False, {}),
    ("video.mc3_18", (3, 4, 16, 16), False, {}),
    ("video.r2plus1d_18", (3, 4, 16, 16), False, {}),
    ("video.s3d", (3, 8, 32, 32), False, {}),
]


def _build(name: str, options: dict[str, Any], draws: bool) -> nn.Module:
    if name.startswith("SwinTransformer"):
        from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

        second = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if name.endswith("v2") else {}
        return SwinTransformer(**options, **second, dropout=0.1, stochastic_depth_prob=0.2, num_classes=10)
    module: Any = torchvision.models
    for part in name.split(" ")[0].split("."):
        module = getattr(module, part)
    if name == "segmentation.FCN":
        body = IntermediateLayerGetter(torchvision.models.resnet18(), {"layer3": "aux", "layer4": "out"})
        return module(body, FCNHead(512, 5), FCNHead(256, 5))
    if name == "MaxVit":
        return module(**options)
    if name.startswith("ResNet"):
        return module(**options, num_classes=10)
    if name == "VisionTransformer":
        return module(**options, dropout=0.1, attention_dropout=0.1, num_classes=10)
    result: nn.Module = module(weights=None, **options)
    # The first layer of these classifiers reads 25,088 or 9,216 numbers per tile: most of the time, and nothing new.
    if name.startswith(("vgg", "alexnet")):
        channels = 512 if name.startswith("vgg") else 256
        result.avgpool = nn.AdaptiveAvgPool2d(1)
        result.classifier = nn.Sequential(nn.Linear(channels, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 10))
    if name == "video.s3d":  # its pool asks for 224 px
        result.avgpool = nn.AdaptiveAvgPool3d(1)
    return result


def models() -> list[ZooModel]:
    """The models of torchvision; each has the dropout of its own defaults."""
    return [
        ZooModel(
            f"torchvision/{name}",
            partial(_build, name, options),
            shape,
            (3, 2 * shape[1] + 5, shape[2]) if rows else None,
        )
        for name, shape, rows, options in ROWS
    ]
