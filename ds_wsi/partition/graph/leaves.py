"""The sub-modules that stay one operation of a graph, and the norms that couple tiles or rows.

Both are told by whose forward they have.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ds_wsi.norms.population import TORCH_NORMS, forward_home, takes_population
from ds_wsi.partition.graph.unrecorded import ForbiddenError

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# The last is a SyncBatchNorm's stand-in while a partition is checked.
_BATCH_NORMS = (TORCH_NORMS, "timm.layers.norm_act", "ds_wsi.partition.module.restored")
_IMAGE_NORMS = (
    *("torch.nn.modules.normalization", "torch.nn.modules.instancenorm"),
    *("timm.layers.norm", "timm.layers.norm_act"),
)
# Whose norms do what their base class says: a LayerNorm normalises the channels of each pixel, wherever they lie.
_LIBRARIES = ("torch.nn.", "torch.ao.nn.", "timm.layers.", "torchvision.", "transformers.")


def home_of(part: nn.Module) -> str:
    """Where a module's forward is written; "" for one of its own, that no class has."""
    return "" if "forward" in part.__dict__ else forward_home(type(part))


def has_library_forward(part: nn.Module) -> bool:
    """Whether a module does what torch, or a library of models, says that its base class does."""
    return home_of(part).startswith(_LIBRARIES)


def has_own_forward(norm: nn.Module) -> bool:
    """Whether a BatchNorm normalises as torch's or timm's class says, by the forward of the class itself."""
    return home_of(norm) in _BATCH_NORMS


def is_known_norm(kind: type) -> bool:
    """Whether a class's forward is that of torch's or timm's BatchNorm, whichever ranks share its population."""
    return forward_home(kind) in _BATCH_NORMS


def needs_batch_statistics(module: nn.Module) -> bool:
    """Whether the module normalises with statistics over its whole batch: the only coupling between tiles."""
    return isinstance(module, _BatchNorm) and takes_population(module)


def needs_image_statistics(module: nn.Module) -> bool:
    """Whether the module normalises with statistics over whole images, which couple their rows.

    One with another's forward is looked into.
    """
    if not isinstance(module, (_InstanceNorm, nn.GroupNorm)) or home_of(module) not in _IMAGE_NORMS:
        return False
    return isinstance(module, nn.GroupNorm) or module.training or not module.track_running_stats


def is_leaf_of_graph(part: nn.Module, name: str) -> bool:
    """Whether a sub-module stays one operation: torch's own, and norms, unless somebody has changed their forward.

    Raises:
        ForbiddenError: a train-mode BatchNorm with another forward.
    """
    if isinstance(part, _BatchNorm) and needs_batch_statistics(part):
        if not has_own_forward(part):
            kind = type(part).__name__
            raise ForbiddenError(
                f"a train-mode BatchNorm must have torch's or timm's own forward, got {kind}'s (layer {name!r}). HINT: "
                "nn.BatchNorm2d, or partition the parts beside it."
            )
        return True
    if isinstance(part, (_BatchNorm, nn.GroupNorm, nn.LayerNorm)):
        return has_own_forward(part) or has_library_forward(part)
    home = type(part).__module__
    return home.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(part, CONTAINERS)


def keeps_shape(leaf: nn.Module) -> bool:
    """Whether a BatchNorm need not be run to know the shape of its result."""
    return isinstance(leaf, _BatchNorm) and has_own_forward(leaf)
