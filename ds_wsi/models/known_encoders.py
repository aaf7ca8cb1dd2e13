"""What is known of pathology encoders before anything is downloaded: architecture, options, normalisation, licence."""

import math
from dataclasses import dataclass, field
from typing import Any

from ds_wsi.runtime.log import logger

HUB, FOLDER, HF = "hf-hub:", "local-dir:", "hf:"
VIT = "vit_base_patch16_224"  # of which `vit_options` make any plain vision transformer
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def vit_options(
    width: int,
    depth: int,
    heads: int,
    *,
    mlp_ratio: float = 4.0,
    patch_size: int = 16,
    img_size: int = 224,
    norm_eps: float = 1e-6,
    init_values: float | None = None,
    swiglu: bool = False,
    qkv_bias: bool = True,
) -> dict[str, Any]:
    """Arguments of `timm.create_model` with which `VIT` is transformers' ViT, or with layer scales its Dinov2.

    Args:
        width, depth, heads, mlp_ratio, patch_size, img_size, norm_eps, qkv_bias: those of transformers' configuration.
        init_values: where the layer scales start; None has no scales.
        swiglu: gated feed-forward layers, of two thirds of the width, up to a multiple of eight.
    """
    options: dict[str, Any] = {
        **{"img_size": img_size, "patch_size": patch_size, "embed_dim": width, "depth": depth, "num_heads": heads},
        **{"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "norm_eps": norm_eps, "dynamic_img_size": True},
    }
    if init_values is not None:
        options["init_values"] = init_values
    if swiglu:
        hidden = math.ceil(int(int(width * mlp_ratio) * 2 / 3) / 8) * 8
        gated = {"mlp_ratio": (2 * hidden + 0.5) / width, "mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
        options |= gated
    return options


@dataclass(frozen=True)
class EncoderSource:
    """What is known of an encoder before it is built.

    Args:
        name: the name that was given.
        architecture: timm's name of it, by which it is built again without a network.
        options: arguments of `timm.create_model`, as JSON has them.
        mean, std: statistics of the channels that it was trained on.
        features: what its authors take from it.
        tile_size_px: what it was trained on, None where that is not known.
        mpp: um/px of what it was trained on, empty where that is not known.
        licence: the terms of its weights, empty where they are not known.
        gated: whether its authors must be asked for them.
        is_own: whether it is of the user's own code, which builds it; `architecture` is then its name.
    """

    name: str
    architecture: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    options: dict[str, Any] = field(default_factory=dict)
    features: str = "pooled"
    tile_size_px: int | None = None
    mpp: tuple[float, ...] = ()
    licence: str = ""
    gated: bool = False
    is_own: bool = False

    @property
    def comes_with_weights(self) -> bool:
        """Whether the name says where the weights are."""
        return self.name.startswith((HUB, FOLDER, HF))

    @property
    def licence_words(self) -> str:
        """The terms of its weights and how they are had; empty where they are not known."""
        if not self.licence:
            return ""
        page = f"https://huggingface.co/{self.name.partition(':')[2]}"
        gate = f"; gated: ask on {page}, then `hf auth login`" if self.gated else ""
        return f"weights under {self.licence}{gate}"

    def weights_name(self, pretrained: bool, weights: object) -> str | None:
        """What timm finds the weights by; None where they are random, or from the file `weights`.

        Raises:
            ValueError: timm has none of own code.
        """
        if pretrained and self.is_own:
            raise ValueError(
                f"--pretrained must be given with a timm model's name, got {self.name}. HINT: leave it out; an option "
                "of your own says which weights are loaded (--encoder_options), or --encoder_weights FILE."
            )
        return self.name if weights is None and (pretrained or self.comes_with_weights) else None

    def warn_of_other_tiles(self, tile_size_px: int, mpp: float) -> None:
        """Log where tiles are not what the encoder was trained on."""
        if self.tile_size_px not in (None, tile_size_px):
            logger.warning(
                "%s was trained on tiles of %d px, got --tile_size_px %d", self.name, self.tile_size_px, tile_size_px
            )
        if self.mpp and not any(abs(mpp - trained_mpp) <= 0.1 * trained_mpp for trained_mpp in self.mpp):
            known_mpp = " or ".join(f"{trained_mpp:g}" for trained_mpp in self.mpp)
            logger.warning("%s was trained at %s um/px, got --mpp %g", self.name, known_mpp, mpp)


_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_LUNIT = (0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464)
_BIOPTIMUS = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
_VIRCHOW = {
    "img_size": 224,
    "init_values": 1e-5,
    "mlp_ratio": 5.3375,
    "mlp_layer": "SwiGLUPacked",
    "act_layer": "silu",
    "dynamic_img_size": True,
}
_H_OPTIMUS = {"img_size": 224, "init_values": 1e-5, "dynamic_img_size": True}

# Read, not tried with the weights, which are gated. Architectures, options and normalisation are those with which
# TRIDENT (github.com/mahmoodlab/TRIDENT, patch_encoder_models/load.py) loads the released files strictly; features as
# in the models' cards. Resolution: UNI (Chen et al. 2024), Virchow (Vorontsov et al. 2024) and Prov-GigaPath (Xu et al.
# 2024) 20x; Virchow2 (Zimmermann et al. 2024) 5x to 40x; H-optimus: docs.bioptimus.com; UNI2-h: 20x in TRIDENT and
# slide2vec. Phikon, Phikon-v2 and Midnight are transformers' models, see hf_weights.py. CONCH is in neither form.
KNOWN: dict[str, EncoderSource] = {
    source.name.lower(): source
    for source in (
        EncoderSource(
            HUB + "MahmoodLab/UNI",
            "vit_large_patch16_224",
            *IMAGENET,
            options={"img_size": 224, "init_values": 1e-5, "dynamic_img_size": True},
            tile_size_px=224,
            licence="CC-BY-NC-ND-4.0",
            gated=True,
            mpp=(0.5,),
        ),
        EncoderSource(
            HUB + "MahmoodLab/UNI2-h",
            "vit_giant_patch14_224",
            *IMAGENET,
            options={
                "img_size": 224,
                "patch_size": 14,
                "depth": 24,
                "num_heads": 24,
                "init_values": 1e-5,
                "embed_dim": 1536,
                "mlp_ratio": 2.66667 * 2,
                "no_embed_class": True,
                "mlp_layer": "SwiGLUPacked",
                "act_layer": "silu",
                "reg_tokens": 8,
                "dynamic_img_size": True,
            },
            tile_size_px=224,
            mpp=(0.5,),
            licence="CC-BY-NC-ND-4.0",
            gated=True,
        ),
        EncoderSource(
            HUB + "prov-gigapath/prov-gigapath",
            "vit_giant_patch14_dinov2",
            *IMAGENET,
            options={
                "img_size": 224,
                "patch_size": 16,
                "embed_dim": 1536,
                "depth": 40,
                "num_heads": 24,
                "init_values": 1e-5,
                "mlp_ratio": 5.33334,
                "dynamic_img_size": True,
            },
            tile_size_px=224,
            licence="Apache-2.0 with conditions",
            gated=True,
            mpp=(0.5,),
        ),
        EncoderSource(
            HUB + "paige-ai/Virchow",
            "vit_huge_patch14_224",
            *IMAGENET,
            options=_VIRCHOW,
            features="cls_mean",
            tile_size_px=224,
            licence="Apache-2.0",
            gated=True,
            mpp=(0.5,),
        ),
        EncoderSource(
            HUB + "paige-ai/Virchow2",
            "vit_huge_patch14_224",
            *IMAGENET,
            options={**_VIRCHOW, "reg_tokens": 4},
            features="cls_mean",
            tile_size_px=224,
            licence="CC-BY-NC-ND-4.0",
            gated=True,
            mpp=(0.25, 0.5, 1.0, 2.0),
        ),
        *(
            EncoderSource(
                f"{HUB}bioptimus/H-optimus-{version}",
                "vit_giant_patch14_reg4_dinov2",
                *_BIOPTIMUS,
                options=_H_OPTIMUS,
                tile_size_px=224,
                mpp=(0.5,),
                licence=licence,
                gated=True,
            )
            for version, licence in ((0, "Apache-2.0"), (1, "CC-BY-NC-ND-4.0"))
        ),
        EncoderSource(
            HUB + "bioptimus/H0-mini",
            "vit_base_patch14_reg4_dinov2",
            *_BIOPTIMUS,
            options={**_H_OPTIMUS, "mlp_ratio": 5.33334, "mlp_layer": "SwiGLUPacked", "act_layer": "silu"},
            features="cls_mean",
            tile_size_px=224,
            mpp=(0.5,),
            licence="CC-BY-NC-ND-4.0",
            gated=True,
        ),
        *(
            EncoderSource(
                f"{HUB}1aurent/{architecture}{size}.kaiko_ai_towards_large_pathology_fms",
                architecture,
                *_HALF,
                options={"img_size": 224, "dynamic_img_size": True, **more},
                tile_size_px=224,
                mpp=(0.5,),
                licence="its authors' terms",
            )
            for architecture, size, more in (
                *((f"vit_{kind}_patch{patch}_224", "", {}) for kind in ("small", "base") for patch in (16, 8)),
                ("vit_large_patch14_reg4_dinov2", "", {"img_size": 518, "init_values": 1e-5}),
            )
        ),
        *(
            EncoderSource(
                f"{HUB}1aurent/{architecture}.lunit_{method}",
                architecture,
                *_LUNIT,
                options=more,
                tile_size_px=224,
                mpp=(0.5,),
                licence="Lunit's non-commercial terms",
            )
            for architecture, method, more in (
                *((f"vit_small_patch{patch}_224", "dino", {"dynamic_img_size": True}) for patch in (16, 8)),
                *(("resnet50", method, {}) for method in ("bt", "swav", "mocov2")),
            )
        ),
        EncoderSource(
            HF + "owkin/phikon",
            VIT,
            *IMAGENET,
            options=vit_options(768, 12, 12, norm_eps=1e-12),
            tile_size_px=224,
            mpp=(0.5,),
            licence="Owkin's non-commercial terms",
        ),
        EncoderSource(
            HF + "owkin/phikon-v2",
            VIT,
            *IMAGENET,
            options=vit_options(1024, 24, 16, init_values=1.0),
            tile_size_px=224,
            mpp=(0.5,),
            licence="Owkin's non-commercial terms",
        ),
        EncoderSource(
            HF + "kaiko-ai/midnight",
            VIT,
            *_HALF,
            options=vit_options(1536, 40, 24, patch_size=14, init_values=1.0, swiglu=True),
            features="cls_mean",
            tile_size_px=224,
            mpp=(0.25, 0.5, 1.0, 2.0),
            licence="MIT",
        ),
    )
}
