"""Stains by colour deconvolution: what a tile would look like with more or less of a dye."""

import torch
from torch import Tensor

# Optical density of haematoxylin, eosin and DAB in red, green and blue: Ruifrok & Johnston, "Quantification of
# histochemical staining by color deconvolution", Anal. Quant. Cytol. Histol. 23 (2001). The third takes up what the
# first two leave, in H&E a residual.
STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))


def shift_stains(tiles: Tensor, gains: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each stain's amount by a gain and add an offset: c' = gain c + offset.

    The augmentation is Tellez et al., "Whole-slide mitosis detection in H&E breast histology using PHH3 as a reference"
    (2018), with one draw per slide. An amount of 1 lets 1 / e of the light of the stain's own colour through.

    Args:
        tiles: floating [N, 3, H, W] in [0, 255].
        gains, offsets: float64 [3], for haematoxylin, eosin and residual; ones and zeros change nothing.

    Returns:
        Floating [N, 3, H, W]. A stronger stain than 255 levels show goes beyond the range: the caller clamps it.
    """
    stains = torch.nn.functional.normalize(torch.tensor(STAINS, dtype=torch.float64), dim=1)
    # density = amounts @ stains, so amounts = density @ inverse: all together one matrix and a constant.
    mix = (stains.inverse() @ torch.diag(gains.double()) @ stains).tolist()
    constant = (offsets.double() @ stains).tolist()
    density = ((tiles + 1) / 256).log_().neg_()  # black has a density too
    # A channel at a time, for a matrix product's rounding depends on how many tiles there are.
    red, green, blue = density.unbind(1)
    shifted = [
        red * mix[0][channel] + green * mix[1][channel] + blue * mix[2][channel] + constant[channel]
        for channel in range(3)
    ]
    return torch.stack(shifted, 1).neg_().exp_().mul_(256).sub_(1)
