"""transformers: vision models built from small configurations; nothing is downloaded.

Each is called as its users call it, `model(pixel_values=x)`, and returns a ModelOutput. Left out: models of text,
sound, boxes and prompts, video's, and SigLIP 2, whose tiles come as patches with a mask.
"""

from functools import partial
from typing import Any

from torch import nn

from .entry import ZooModel

VIT = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
DINO = {key: value for key, value in VIT.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
RESNET = {"embedding_size": 8, **STAGES}
PYRAMID = {
    "num_encoder_blocks": 4,
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 24, 32],
    "num_attention_heads": [1, 2, 3, 4],
}

# model class, configuration class, side of a tile in px, whether rows can be tried, configuration, rates of draws
ROWS: list[tuple[str, str, int, bool, dict[str, Any], dict[str, Any]]] = [
    ("ViTModel", "ViTConfig", 32, False, VIT, {"hidden_dropout_prob": 0.1}),
    ("ViTForImageClassification", "ViTConfig", 32, False, VIT, {"hidden_dropout_prob": 0.1}),
    ("DeiTModel", "DeiTConfig", 32, False, VIT, {"hidden_dropout_prob": 0.1}),
    ("BeitModel", "BeitConfig", 32, False, VIT, {"drop_path_rate": 0.2}),
    ("Data2VecVisionModel", "Data2VecVisionConfig", 32, False, VIT, {"drop_path_rate": 0.2}),
    ("ViTMSNModel", "ViTMSNConfig", 32, False, VIT, {"hidden_dropout_prob": 0.1}),
    ("ViTMAEModel", "ViTMAEConfig", 32, False, {**VIT, "mask_ratio": 0.0}, {}),
    ("IJepaModel", "IJepaConfig", 32, False, VIT, {"hidden_dropout_prob": 0.1}),
    ("Dinov2Model", "Dinov2Config", 32, False, DINO, {"drop_path_rate": 0.2}),
    ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", 32, False, DINO, {"drop_path_rate": 0.2}),
    ("DINOv3ViTModel", "DINOv3ViTConfig", 32, False, {**VIT, "pos_embed_rescale": None}, {"pos_embed_rescale": 2.0}),
    ("DINOv3ConvNextModel", "DINOv3ConvNextConfig", 64, False, STAGES, {"drop_path_rate": 0.2}),
    ("CLIPVisionModel", "CLIPVisionConfig", 32, False, VIT, {"attention_dropout": 0.1}),
    ("SiglipVisionModel", "SiglipVisionConfig", 32, False, VIT, {"attention_dropout": 0.1}),
    ("Aimv2VisionModel", "Aimv2VisionConfig", 32, False, VIT, {"attention_dropout": 0.1}),
    ("SwinModel", "SwinConfig", 64, False, SWIN, {"drop_path_rate": 0.2}),
    ("Swinv2Model", "Swinv2Config", 64, False, SWIN, {"drop_path_rate": 0.2}),
    ("HieraModel", "HieraConfig", 224, False, {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]}, {}),
    ("ConvNextModel", "ConvNextConfig", 64, True, STAGES, {"drop_path_rate": 0.2}),
    ("ConvNextV2Model", "ConvNextV2Config", 64, True, STAGES, {"drop_path_rate": 0.2}),
    ("ResNetModel", "ResNetConfig", 64, True, {**RESNET, "layer_type": "basic"}, {}),
    ("ResNetForImageClassification", "ResNetConfig", 64, True, {**RESNET, "layer_type": "bottleneck"}, {}),
    ("RegNetModel", "RegNetConfig", 64, True, {**RESNET, "groups_width": 4}, {}),
    ("BitModel", "BitConfig", 64, True, {**RESNET, "num_groups": 4}, {"drop_path_rate": 0.2}),
    ("HGNetV2ForImageClassification", "HGNetV2Config", 64, True, {}, {}),
    (
        "EfficientNetModel",
        "EfficientNetConfig",
        64,
        True,
        {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
        {"drop_connect_rate": 0.2},
    ),
    ("MobileNetV1Model", "MobileNetV1Config", 64, True, {"depth_multiplier": 0.25}, {}),
    ("MobileNetV2Model", "MobileNetV2Config", 64, True, {"depth_multiplier": 0.35}, {}),
    (
        "MobileViTModel",
        "MobileViTConfig",
        64,
        False,
        {"image_size": 64, "hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 8, 16, 24, 32, 40, 64]},
        {"hidden_dropout_prob": 0.1},
    ),
    ("MobileViTV2Model", "MobileViTV2Config", 64, False, {"image_size": 64, "width_multiplier": 0.5}, {}),
    (
        "LevitModel",
        "LevitConfig",
        64,
        False,
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 48],
            "num_attention_heads": [2, 4, 6],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        {},
    ),
    (
        "CvtModel",
        "CvtConfig",
        64,
        False,
        {"embed_dim": [8, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
        {"drop_path_rate": [0.0, 0.0, 0.2]},
    ),
    (
        "FocalNetModel",
        "FocalNetConfig",
        64,
        False,
        {"image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1]},
        {"drop_path_rate": 0.2},
    ),
    (
        "PoolFormerModel",
        "PoolFormerConfig",
        64,
        True,
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
        {"drop_path_rate": 0.2},
    ),
    ("PvtModel", "PvtConfig", 64, False, {**PYRAMID, "image_size": 64}, {"drop_path_rate": 0.2}),
    ("PvtV2Model", "PvtV2Config", 64, False, {**PYRAMID, "image_size": 64}, {"drop_path_rate": 0.2}),
    ("SegformerModel", "SegformerConfig", 64, False, PYRAMID, {"drop_path_rate": 0.2}),
    (
        "SwiftFormerModel",
        "SwiftFormerConfig",
        64,
        False,
        {"image_size": 64, "embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
        {"drop_path_rate": 0.2},
    ),
    ("TextNetModel", "TextNetConfig", 64, True, {}, {}),
    ("PPLCNetForImageClassification", "PPLCNetConfig", 64, True, {"scale": 0.35}, {}),
    (
        "VitDetModel",
        "VitDetConfig",
        32,
        False,
        {
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "pretrain_image_size": 32,
            "patch_size": 8,
        },
        {"drop_path_rate": 0.2},
    ),
    ("TimmWrapperModel", "TimmWrapperConfig", 64, True, {"architecture": "resnet10t", "do_pooling": True}, {}),
]


def _build(kind: str, config: str, options: dict[str, Any], rates: dict[str, Any], draws: bool) -> nn.Module:
    import transformers

    settings = getattr(transformers, config)(**{**options, **(rates if draws else {})})
    return getattr(transformers, kind)(settings)


def models() -> list[ZooModel]:
    """The models of transformers."""
    return [
        ZooModel(
            f"transformers/{kind}",
            partial(_build, kind, config, options, rates),
            (3, side, side),
            (3, 2 * side + 5, side) if rows else None,
            "pixel_values",
        )
        for kind, config, side, rows, options, rates in ROWS
    ]
