"""Every private name of torch, DeepSpeed, Accelerate and transformers that ds_wsi uses: one table, checked by name.

A private name can go with any release. Each has a row here: what it is used for, and the versions that it was seen in.
`check_seams` runs where names are first needed and refuses a version without one of them by name; the alternative is an
AttributeError in the middle of a run. Rows say in which packages of ds_wsi a name may be written (`places`); everybody
else takes it from a function or a class of this module. A test compares the table with the source.
"""

from typing import TYPE_CHECKING, Any

from ds_wsi.runtime.seams.checks import check_replaced, check_seams, lacking, missing_seams, parameters_of, value_of
from ds_wsi.runtime.seams.readers import (
    default_store,
    fp16_scale_of,
    fsdp_param_groups,
    is_zero3_part,
    operation_of,
    storage_key,
    whole_shape,
    writes_to_inputs,
)
from ds_wsi.runtime.seams.row import SEEN, Seam, SeamError
from ds_wsi.runtime.seams.table import SEAMS

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch._utils import ExceptionWrapper
    from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
    from torch.nn.modules.dropout import _DropoutNd as AnyDropout
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

__all__ = [
    "CLASSES",
    "SEAMS",
    "SEEN",
    "AnyBatchNorm",
    "AnyDropout",
    "ExceptionWrapper",
    "FakeTensor",
    "FakeTensorMode",
    "Seam",
    "SeamError",
    "TorchDispatchMode",
    "check_replaced",
    "check_seams",
    "default_store",
    "fp16_scale_of",
    "fsdp_param_groups",
    "is_zero3_part",
    "lacking",
    "missing_seams",
    "operation_of",
    "parameters_of",
    "storage_key",
    "tree_leaves",
    "whole_shape",
    "writes_to_inputs",
]

# What modules of ds_wsi import from here by a name of ours -> the row.
CLASSES = {
    "AnyBatchNorm": "torch.nn.modules.batchnorm:_BatchNorm",
    "AnyDropout": "torch.nn.modules.dropout:_DropoutNd",
    "ExceptionWrapper": "torch._utils:ExceptionWrapper",
    "FakeTensor": "torch._subclasses.fake_tensor:FakeTensor",
    "FakeTensorMode": "torch._subclasses.fake_tensor:FakeTensorMode",
    "TorchDispatchMode": "torch.utils._python_dispatch:TorchDispatchMode",
    "tree_leaves": "torch.utils._pytree:tree_leaves",
}


def __getattr__(name: str) -> Any:
    """A class of `CLASSES`, looked up when it is imported.

    Raises:
        SeamError: the installed torch lacks it.
    """
    if name not in CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    (row,) = (row for row in SEAMS if row.name == CLASSES[name])
    return value_of(row)
