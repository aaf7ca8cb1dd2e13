"""timm: one small model of every model file, and variants that compute otherwise than the first.

Where a family has no small member it is made small by the arguments that timm's own constructors take.
"""

import importlib
from functools import partial
from typing import Any

import timm
from torch import nn

from .entry import ZooModel

VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 4}
FOUR = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64)}

# family (timm's model file), name, side of a tile in px, whether rows of a large image can be tried, arguments
ROWS: list[tuple[str, str, int, bool, dict[str, Any]]] = [
    ("beit", "beit_base_patch16_224", 32, False, VIT),
    ("byoanet", "botnet26t_256", 64, False, {"img_size": 64}),
    ("byoanet", "halonet26t", 64, False, {"self_attn_kwargs": {"block_size": 2, "halo_size": 1}}),
    ("byoanet", "lambda_resnet26t", 64, False, {"img_size": 64}),
    ("byobnet", "test_byobnet", 64, True, {}),
    ("byobnet", "mobileone_s0", 32, True, {}),
    ("byobnet", "gernet_s", 64, True, {}),
    ("byobnet", "repvgg_a0", 64, True, {}),
    ("byobnet", "gcresnet33ts", 32, False, {}),
    ("cait", "cait_xxs24_224", 32, False, {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48}),
    ("coat", "coat_tiny", 64, False, {"img_size": 64, "serial_depths": (1, 1, 1, 1), "parallel_depth": 1}),
    ("coat", "coat_lite_tiny", 64, False, {"img_size": 64, "serial_depths": (1, 1, 1, 1)}),
    ("convit", "convit_tiny", 32, False, {"img_size": 32, "patch_size": 8, "depth": 3, "local_up_to_layer": 2}),
    ("convmixer", "ConvMixer", 32, True, {"dim": 32, "depth": 4}),
    ("convnext", "test_convnext", 32, True, {}),
    ("convnext", "convnextv2_atto", 32, True, {"depths": (1, 1, 2, 1)}),
    ("convnext", "convnext_zepto_rms", 32, True, {}),
    ("cpubone", "cpubone_nano", 64, False, {}),
    ("crossvit", "crossvit_9_240", 48, False, {"img_size": 48, "img_scale": (1.0, 1.0), "patch_size": (12, 16)}),
    ("csatv2", "csatv2", 64, False, {}),
    ("cspnet", "cs3darknet_focus_s", 64, True, {}),
    ("cspnet", "cspresnet50", 32, True, {}),
    ("cspnext", "cspnext_tiny", 64, True, {}),
    ("davit", "davit_tiny", 64, False, {**FOUR, "num_heads": (1, 2, 3, 4)}),
    ("deepseek_vit", "deepseek_vit_412m", 32, False, VIT),
    ("deit", "deit_tiny_distilled_patch16_224", 32, False, VIT),
    ("deit", "deit3_small_patch16_224", 32, False, VIT),
    ("densenet", "densenet121", 64, True, {"block_config": (2, 2, 2, 2), "growth_rate": 8}),
    ("densenet", "densenetblur121d", 64, True, {"block_config": (2, 2, 2, 2), "growth_rate": 8}),
    ("dla", "dla46x_c", 64, True, {}),
    ("dla", "dla60_res2net", 32, True, {}),
    ("dpn", "dpn48b", 64, True, {"k_sec": (1, 1, 2, 1)}),
    ("edgenext", "edgenext_xx_small", 64, False, {}),
    ("efficientformer", "efficientformer_l1", 224, False, {"depths": (1, 1, 1, 2), "embed_dims": (8, 16, 16, 32)}),
    ("efficientformer_v2", "efficientformerv2_s0", 64, False, {"img_size": 64}),
    ("efficientnet", "mobilenetv2_050", 64, True, {}),
    ("efficientnet", "efficientnet_b0", 64, True, {}),
    ("efficientnet", "tf_efficientnet_lite0", 64, True, {}),
    ("efficientnet", "mixnet_s", 64, True, {}),
    ("efficientnet", "test_efficientnet_evos", 64, True, {}),
    ("efficientnet", "test_efficientnet_gn", 64, True, {}),
    ("efficientvim", "efficientvim_m1", 64, False, {}),
    ("efficientvit_mit", "efficientvit_b0", 64, False, {}),
    ("efficientvit_msra", "efficientvit_m0", 128, False, {"img_size": 128}),
    ("eva", "eva02_base_patch14_224", 32, False, VIT),
    ("eva", "vit_small_patch16_dinov3", 32, False, VIT),
    ("fasternet", "fasternet_t0", 64, True, {}),
    ("fastvit", "fastvit_t8", 64, False, {}),
    ("focalnet", "FocalNet", 64, False, {"depths": (1, 1, 1, 1), "embed_dim": 16}),
    (
        "gcvit",
        "GlobalContextVit",
        64,
        False,
        {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 4, 8)},
    ),
    ("gemma4_vit", "gemma4_vit_167m", 48, False, {"img_size": 48, "depth": 2, "embed_dim": 48, "num_heads": 4}),
    ("ghostnet", "ghostnet_050", 64, True, {}),
    ("ghostnet", "ghostnetv2_100", 64, False, {}),
    ("ghostnet", "ghostnetv3_050", 64, False, {}),
    ("hardcorenas", "hardcorenas_a", 64, True, {}),
    ("hgnet", "hgnetv2_b0", 64, True, {}),
    ("hiera", "hiera_tiny_224", 64, False, {"img_size": (64, 64), "embed_dim": 16}),
    (
        "hieradet_sam2",
        "hieradet_small",
        64,
        False,
        {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 2, 1), "global_att_blocks": (3,)},
    ),
    ("hrnet", "hrnet_w18_small", 64, True, {}),
    ("iformer", "iformer_t", 64, False, {}),
    ("inception_next", "inception_next_atto", 64, True, {}),
    ("inception_resnet_v2", "inception_resnet_v2", 80, True, {}),
    ("inception_v3", "inception_v3", 80, True, {}),
    ("inception_v4", "inception_v4", 80, True, {}),
    ("lcnetv2", "lcnetv2_small", 64, True, {}),
    ("levit", "levit_128s", 64, False, {"img_size": 64}),
    ("levit", "levit_conv_128s", 64, False, {"img_size": 64}),
    ("lowformer", "lowformer_b0", 64, False, {}),
    ("mambaout", "test_mambaout", 64, True, {}),
    ("maxxvit", "coatnet_nano_rw_224", 64, False, {"img_size": 64}),
    ("maxxvit", "maxvit_rmlp_pico_rw_256", 64, False, {"img_size": 64}),
    ("metaformer", "poolformer_s12", 32, True, {}),
    ("metaformer", "caformer_s18", 32, False, {}),
    ("mlp_mixer", "gmlp_ti16_224", 32, False, {"img_size": 32}),
    ("mlp_mixer", "resmlp_12_224", 32, False, {"img_size": 32}),
    ("mobilenetv3", "mobilenetv3_small_050", 64, True, {}),
    ("mobilenetv3", "mobilenetv4_conv_small_035", 64, True, {}),
    ("mobilenetv3", "fbnetv3_b", 64, True, {}),
    ("mobilenetv5", "mobilenetv5_base", 64, False, {}),
    ("mobilevit", "mobilevit_xxs", 64, False, {}),
    ("mobilevit", "mobilevitv2_050", 64, False, {}),
    ("mvitv2", "mvitv2_tiny", 64, False, {"img_size": 64}),
    ("naflexvit", "naflexvit_base_patch16_gap", 32, False, {"depth": 2, "embed_dim": 48, "num_heads": 4}),
    ("nasnet", "nasnetalarge", 64, False, {"stem_size": 12, "num_features": 24 * 12}),
    (
        "nest",
        "Nest",
        64,
        False,
        {"img_size": 64, "embed_dims": (16, 32, 64), "num_heads": (1, 2, 4), "depths": (1, 1, 1)},
    ),
    ("nextvit", "nextvit_small", 32, False, {}),
    ("nfnet", "test_nfnet", 64, True, {}),
    ("nfnet", "nf_regnet_b0", 64, True, {}),
    ("pit", "pit_ti_224", 64, False, {"img_size": 64}),
    ("pit", "pit_ti_distilled_224", 64, False, {"img_size": 64}),
    ("pnasnet", "pnasnet5large", 32, False, {}),
    ("pvt_v2", "pvt_v2_b0", 64, False, {}),
    ("qwen3_vit", "qwen3_vit_88m", 32, False, {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 4}),
    ("rdnet", "rdnet_tiny", 32, True, {}),
    ("regnet", "regnetx_002", 64, True, {}),
    ("regnet", "regnety_002", 64, True, {}),
    ("repghost", "repghostnet_050", 64, True, {}),
    ("repvit", "repvit_m0_9", 64, True, {}),
    ("res2net", "res2net50_14w_8s", 64, True, {"layers": (1, 1, 1, 1)}),
    ("resnest", "resnest14d", 64, True, {}),
    ("resnet", "resnet10t", 64, True, {}),
    ("resnet", "resnet50", 64, True, {"layers": (1, 1, 2, 1)}),
    ("resnet", "seresnext26d_32x4d", 32, True, {}),
    ("resnetv2", "resnetv2_18", 64, True, {}),
    ("resnetv2", "resnetv2_50d_evos", 64, True, {"layers": (1, 1, 1, 1)}),
    ("resnetv2", "resnetv2_50x1_bit", 32, True, {}),
    ("rexnet", "rexnet_100", 64, True, {}),
    ("selecsls", "selecsls42", 64, True, {}),
    ("senet", "legacy_seresnet18", 64, True, {}),
    (
        "sequencer",
        "sequencer2d_s",
        64,
        False,
        {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "hidden_sizes": (4, 8, 8, 8)},
    ),
    ("shvit", "shvit_s1", 128, False, {}),
    ("sknet", "skresnet18", 64, True, {}),
    ("starnet", "starnet_s050", 64, True, {}),
    ("swiftformer", "swiftformer_xs", 64, False, {}),
    (
        "swin_transformer",
        "swin_tiny_patch4_window7_224",
        64,
        False,
        {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)},
    ),
    (
        "swin_transformer_v2",
        "swinv2_tiny_window8_256",
        64,
        False,
        {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)},
    ),
    (
        "swin_transformer_v2_cr",
        "swinv2_cr_tiny_224",
        64,
        False,
        {"img_size": 64, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)},
    ),
    ("tiny_vit", "tiny_vit_5m_224", 64, False, {"depths": (1, 1, 2, 1)}),
    ("tnt", "tnt_s_patch16_224", 32, False, {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads_outer": 4}),
    ("tresnet", "tresnet_m", 64, True, {"layers": (1, 1, 1, 1)}),
    ("twins", "twins_pcpvt_small", 64, False, {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dims": (16, 32, 80, 64)}),
    (
        "twins",
        "twins_svt_small",
        64,
        False,
        {"img_size": 64, "depths": (1, 1, 2, 1), "embed_dims": (16, 32, 64, 64), "wss": (4, 4, 4, 2)},
    ),
    ("vgg", "vgg11", 32, True, {"mlp_ratio": 0.02}),
    ("vgg", "vgg11_bn", 32, True, {"mlp_ratio": 0.02}),
    ("vision_transformer", "vit_tiny_patch16_224", 32, False, VIT),
    ("vision_transformer", "vit_base_patch16_siglip_224", 32, False, VIT),
    ("vision_transformer", "vit_base_patch16_rope_ape_224", 32, False, VIT),
    ("vision_transformer_hybrid", "vit_tiny_r_s16_p8_224", 64, False, {"img_size": 64, "depth": 2}),
    (
        "vision_transformer_hybrid",
        "vit_base_resnet26d_224",
        64,
        False,
        {"img_size": 64, "depth": 1, "embed_dim": 48, "num_heads": 4},
    ),
    ("vision_transformer_relpos", "test_vit_relpos", 32, False, {"img_size": 32}),
    (
        "vision_transformer_sam",
        "samvit_base_patch16",
        32,
        False,
        {**VIT, "window_size": 2, "global_attn_indexes": (1,)},
    ),
    ("vitamin", "vitamin_small_224", 64, False, {"img_size": 64, "depth": 1}),
    ("volo", "volo_d1_224", 64, False, {"img_size": 64}),
    ("vovnet", "ese_vovnet19b_slim", 64, True, {}),
    ("visformer", "visformer_tiny", 64, False, {"img_size": 64, "depth": (2, 1, 1)}),
    ("xception", "legacy_xception", 32, True, {}),
    ("xception_aligned", "xception41", 32, True, {}),
    ("xcit", "xcit_nano_12_p16_224", 64, False, {"img_size": 64, "depth": 2}),
]


IN_FLOAT32 = ("naflexvit_base_patch16_gap",)  # it interpolates its positions in float32


def _build(family: str, name: str, options: dict[str, Any], draws: bool) -> nn.Module:
    """The model by timm's name, or by the class of that name in the model file, whose constructor takes more arguments.

    With draws, as far as the constructor knows rates of dropout and drop path.
    """
    kind = getattr(importlib.import_module(f"timm.models.{family}"), name, None)
    make = kind if isinstance(kind, type) else partial(timm.create_model, name)
    rates = {"drop_rate": 0.2, "drop_path_rate": 0.2}
    for some in (rates, {"drop_rate": 0.2}, {"drop_path_rate": 0.2}) if draws else ():
        try:
            return make(num_classes=0, **options, **some)
        except TypeError as error:
            if not any(rate in str(error) for rate in rates):
                raise
    return make(num_classes=0, **options)


def models() -> list[ZooModel]:
    """The models of timm."""
    return [
        ZooModel(
            f"timm/{family}/{name}",
            partial(_build, family, name, options),
            (3, side, side),
            (3, 2 * side + 5, side) if rows else None,
            floor=1e-6 if name in IN_FLOAT32 else 1e-9,
        )
        for family, name, side, rows, options in ROWS
    ]
