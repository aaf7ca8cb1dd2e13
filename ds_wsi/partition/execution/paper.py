"""Mode "paper": Big-Layers' Algorithms 1 and 2 to the letter, layer by layer: the baseline of all measurements.

No stream, no overlap, pageable memory. One reading note: Algorithm 2, line 10 normalises with the BATCH statistics, as
BatchNorm does; the running ones are updated once, with the unbiased variance.

What a layer is told by its attributes is read at each call, as its own forward would.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from ds_wsi.norms.population import TORCH_NORMS, after_norm, forward_home, takes_population, track
from ds_wsi.norms.roles import population_group
from ds_wsi.partition.execution.paper_layers import Carrier, Convolution, Normalise, Setting, statistics
from ds_wsi.partition.graph.geometry import geometry_of
from ds_wsi.partition.module.arguments import Arguments
from ds_wsi.partition.module.surroundings import refuse_transforms

# Algorithm 1, line 10: cheap layers work where their input is. timm's are known by their home: it is not imported here.
_CHEAP_HOMES = (
    "torch.nn.modules.activation",
    "torch.nn.modules.dropout",
    "timm.layers.activations",
    "timm.layers.drop",
)
_CHEAP = (nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.Sequential)
_NORM_HOMES = (TORCH_NORMS, "timm.layers.norm_act")
_REMEDY = 'HINT: choose mode "lean", "recompute" or "offload", or keep this layer out of the module.'


class PaperLayer:
    """The forward of one layer: a convolution or a norm in sub-tensors, any other where Algorithm 1 has it.

    An object of a class, so that a copy of the layer, or a pickle, holds one of its own.
    """

    def __init__(self, setting: Setting, name: str, leaf: nn.Module) -> None:
        self.setting, self.name, self.leaf = setting, name, leaf

    @property
    def __signature__(self) -> inspect.Signature:
        """The arguments that the layer's own forward takes."""
        return inspect.signature(self.native)

    @property
    def native(self) -> Callable[..., Any]:
        """The forward of the layer's class as it is now: FSDP2 and parametrizations give a layer another class."""
        return type(self.leaf).forward.__get__(self.leaf)

    @torch.compiler.disable  # a compiled caller runs the layers as they are
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, where its size belongs.

        Raises:
            ValueError: the layer, or its input, is not supported.
        """
        leaf = self.leaf
        require_supported(self.name, leaf)
        if isinstance(leaf, (nn.Conv2d, nn.BatchNorm2d)):
            (x,) = inspect.signature(self.native).bind(*args, **kwargs).args
            return self._in_sub_tensors(x) if isinstance(x, Tensor) else self.native(x)
        cheap = isinstance(leaf, _CHEAP) or type(leaf).__module__.startswith(_CHEAP_HOMES)
        if cheap and not [*leaf.parameters(), *leaf.buffers()]:  # a PReLU's weight is on the device
            return self._where_its_input_is(args, kwargs)
        # On the device, and so is all that follows.
        return self.native(*map(self._on_device, args), **{key: self._on_device(kwargs[key]) for key in kwargs})

    def _on_device(self, value: Any) -> Any:
        return value.to(self.setting.device) if isinstance(value, Tensor) else value

    def _where_its_input_is(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A cheap layer; then Algorithm 1, lines 14-16."""
        out = self.native(*args, **kwargs)
        on_host = all(value.device.type == "cpu" for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return out.to(self.setting.place(out.nbytes)) if on_host and isinstance(out, Tensor) else out

    def _in_sub_tensors(self, x: Tensor) -> Tensor:
        setting = self.setting
        if x.dim() != 4:
            raise ValueError(
                f"input must be [N, C, H, W], got {tuple(x.shape)} (layer {self.name}). HINT: x[None] for one image."
            )
        small = x.nbytes <= setting.stop_bytes
        if small or x.device.type != "cpu":
            out = self.native(x.to(setting.device))
            # A bottleneck's last convolution may outgrow the limit again; its shortcut is in CPU RAM.
            return out.to(setting.place(out.nbytes)) if small else out
        weight, bias = self.leaf.weight, self.leaf.bias
        tensors = [part for part in (weight, bias) if isinstance(part, Tensor)]
        save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *tensors))
        refuse_transforms(x, tensors, save=save)
        carrier = Carrier(x, *tensors)
        if isinstance(self.leaf, nn.Conv2d):
            return self._convolved(x, weight, bias, carrier)
        return self._normalised(x, weight, bias, carrier)

    def _convolved(self, x: Tensor, weight: Any, bias: Any, carrier: Carrier) -> Tensor:
        shape = geometry_of(self.leaf, weight)
        if shape.out_height(x.shape[2]) < 1:
            raise ValueError(
                f"input must be at least as high as the kernel, got {tuple(x.shape)} (layer {self.name}). "
                "HINT: give larger images."
            )
        return Convolution.apply(self.setting, shape, carrier, x, weight, bias)

    def _normalised(self, x: Tensor, weight: Any, bias: Any, carrier: Carrier) -> Tensor:
        setting, leaf = self.setting, self.leaf
        assert isinstance(leaf, nn.BatchNorm2d)
        of_batch = takes_population(leaf)
        with torch.no_grad():
            if of_batch:
                if x.numel() == x.shape[1]:
                    raise ValueError(
                        f"train-mode BatchNorm must see more than one value per channel, got 1 (layer {self.name}). "
                        "HINT: give more tiles, or call eval()."
                    )
                moments = statistics(setting, x)
                # Line 9: once, with the unbiased variance.
                track(leaf, moments.mean, moments.unbiased_var)
                mean, var = moments.mean, moments.var
            else:
                wide = torch.promote_types(x.dtype, torch.float32)
                mean, var = (setting.load(part, wide) for part in (leaf.running_mean, leaf.running_var))  # type: ignore[arg-type]
        out = Normalise.apply(setting, leaf.eps, of_batch, carrier, mean, var, x, weight, bias)
        return after_norm(leaf, out)  # cheap layers, on the CPU


class PaperForward:
    """The forward of the whole module: it brings the input to CPU RAM, where the first layer looks for it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.below = module, module.__dict__.get("forward")

    @property
    def __signature__(self) -> inspect.Signature:
        """The arguments that the module's own forward takes."""
        return inspect.signature(self.native)

    @property
    def native(self) -> Callable[..., Any]:
        """What was the module's forward before."""
        below = type(self.module).forward.__get__(self.module) if self.below is None else self.below
        return cast(Callable[..., Any], below)

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output: its first argument, or what is given under that name, are the tiles.

        Raises:
            ValueError: the tiles are no tensor; bounds of bags are given, or what prepares chunks.
        """
        owner = type(self.module).__name__
        for name in ("cu_seqlens", "prepare"):
            if name in kwargs and name not in self.__signature__.parameters:
                raise ValueError(
                    f'a module in mode "paper" must be given the tiles of one bag as its layers take them, got {name} '
                    f"({owner}). HINT: call it bag by bag, or choose another mode."
                )
        x, arguments = Arguments.bind(self.native, args, kwargs, owner)
        if not isinstance(x, Tensor):
            raise ValueError(f"the tiles of a partitioned {owner} must be a tensor [N, ...], got a {type(x).__name__}")
        return arguments.call(self.native, x.cpu())


def require_supported(name: str, leaf: nn.Module) -> None:
    """Refuse a layer whose forward is none that the sub-tensors' sum is known of.

    A layer is asked at each call too: its class and its padding may change.

    Raises:
        ValueError: names it.
    """
    if isinstance(leaf, nn.Conv2d):
        own = type(leaf)
        known = own.forward is nn.Conv2d.forward and own._conv_forward is nn.Conv2d._conv_forward
        known = known and "_conv_forward" not in leaf.__dict__
    else:
        known = not isinstance(leaf, (nn.BatchNorm2d, nn.SyncBatchNorm)) or (
            isinstance(leaf, nn.BatchNorm2d) and forward_home(type(leaf)) in _NORM_HOMES
        )
    if not known:
        raise ValueError(
            "a convolution or norm must have the forward of torch's Conv2d or BatchNorm2d, or of timm's "
            f'BatchNormAct2d, in mode "paper", got {type(leaf).__name__} (layer {name}). {_REMEDY}'
        )
    if population_group(leaf, in_training=True) is not None:
        raise ValueError(
            f'a norm must average over the tiles of one process in mode "paper", got {type(leaf).__name__} that is '
            f"shared among ranks (layer {name}). {_REMEDY}"
        )
    if isinstance(leaf, nn.Conv2d) and leaf.padding_mode != "zeros":
        raise ValueError(
            f'padding_mode must be "zeros" in mode "paper", got {leaf.padding_mode!r} (layer {name}). {_REMEDY}'
        )


def _layers(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers of the paper by qualified name: convolutions, norms, and modules without children."""
    children = list(module.named_children())
    if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) or not children:
        yield name or type(module).__name__, module
        return
    own = [key for key, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    if own:
        raise ValueError(
            f'a module with children must own no tensor in mode "paper", got {own[0]!r} '
            f"(module {name or type(module).__name__}, {type(module).__name__}). {_REMEDY}"
        )
    for key, child in children:
        yield from _layers(child, f"{name}.{key}" if name else key)


def _forward_of(setting: Setting, name: str, leaf: nn.Module) -> PaperLayer:
    if "forward" in leaf.__dict__:
        raise ValueError(
            f'a layer must have the forward of its class in mode "paper", got another (layer {name}). '
            "HINT: undo the earlier partition or hook first."
        )
    require_supported(name, leaf)
    return PaperLayer(setting, name, leaf)


def apply_paper(
    module: nn.Module, *, device: torch.device, axis: str, chunk: int, stop_bytes: int = 0
) -> Callable[[], None]:
    """Compute `module` layer by layer with its large maps in CPU RAM, in place: the paper's method as printed.

    Conv2d and BatchNorm2d bring sub-tensors to `device` one by one, forward and backward. Activations, dropout and
    local pooling work where their input is. Everything else (global pooling, Linear) moves its input to `device`.
    The numbers are the module's own: train-mode BatchNorm normalises over the whole call, gradients of weights are
    summed in float32 (float64 for float64), the autocast of the forward holds in the backward.

    Only the instance attribute `forward` of the module and its layers changes; the state_dict does not. BatchNorm's
    running statistics are updated as ever. Deep copies and pickles compute in the same way with layers of their own.
    With `stop_bytes`, branches may only be joined by operations on maps of one shape (residuals).

    Args:
        module: a CNN with its parameters on `device`; its input [N, C, H, W], floating point, is brought to CPU RAM.
            The output is on `device` after a layer of the last kind, else where its size puts it.
        device: where sub-tensors are computed.
        axis: "batch" (sub-tensors of tiles) or "spatial" (of rows, convolutions with exact halos).
        chunk: tiles, or output rows, of a sub-tensor.
        stop_bytes: maps of at most as many bytes live on `device`, and layers that read them run there natively.

    Returns:
        The undo function.

    Raises:
        ValueError: an argument is out of range; a layer is not supported (another padding_mode, SyncBatchNorm, a
            subclass with a forward of its own, a module with children and tensors of its own, partitioned already).

    Source: Big-Layers, Algorithm 1 (layers) and Algorithm 2 (BatchNorm).
    """
    if axis not in ("batch", "spatial"):
        raise ValueError(
            f'axis must be "batch" or "spatial", got {axis!r} (apply_paper). HINT: "batch" for bags of tiles.'
        )
    for key, value, least in (("chunk", chunk, 1), ("stop_bytes", stop_bytes, 0)):
        if value < least:
            raise ValueError(f"{key} must be at least {least}, got {value} (apply_paper). HINT: give {least} or more.")
    setting = Setting(torch.device(device), axis, chunk, stop_bytes)
    names = {leaf: name for name, leaf in _layers(module, "")}  # a layer used twice counts once
    forwards: dict[nn.Module, Any] = {leaf: _forward_of(setting, name, leaf) for leaf, name in names.items()}
    before = {part: part.__dict__.get("forward") for part in (*forwards, module)}
    for leaf, forward in forwards.items():  # all, or none at an error
        leaf.forward = forward
    forwards[module] = module.forward = PaperForward(module)  # over a layer's, where the module is one

    def undo() -> None:
        _undo(forwards, before, names)

    return undo


def _undo(forwards: dict[nn.Module, Any], before: dict[nn.Module, Any], names: dict[nn.Module, str]) -> None:
    """Give all parts the forwards back that they had, or none at an error."""
    for part, forward in forwards.items():
        if part.__dict__.get("forward", forward) is not forward:
            raise ValueError(
                "a partition must be the layer's forward to be removed, got another set over it "
                f"(layer {names.get(part, type(part).__name__)}). HINT: take that off first."
            )
    for part, forward in forwards.items():
        if part.__dict__.get("forward") is forward:
            del part.__dict__["forward"]
            if before[part] is not None:
                part.forward = before[part]
