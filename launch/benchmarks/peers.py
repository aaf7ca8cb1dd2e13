"""What the partitioned layers are compared with: other ways of training through activations that do not fit.

A peer takes an encoder and returns its forward; the caller back-propagates what that returns with `.backward()`, and
the gradients are found in the encoder's own parameters.
"""

import copy
import importlib
import inspect
import io
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint

Forward = Callable[[Tensor], Tensor]


def native(encoder: nn.Module) -> Forward:
    """The encoder as it is."""
    return encoder


def torch_checkpoint(encoder: nn.Module) -> Forward:
    """Activation checkpoints where timm puts them (a block each, in most encoders), else one over the whole encoder.

    BatchNorm in training mode updates its running statistics twice per step; the gradients are right.
    """
    if not hasattr(encoder, "set_grad_checkpointing"):
        return lambda images: checkpoint(encoder, images, use_reentrant=False)
    switch: Callable[[bool], None] = encoder.set_grad_checkpointing  # type: ignore[assignment]

    def forward(images: Tensor) -> Tensor:
        switch(True)
        try:
            return encoder(images)
        finally:
            switch(False)  # only the forward reads it, so that the other peers find the encoder as it was

    return forward


def save_on_cpu(encoder: nn.Module) -> Forward:
    """Every tensor that autograd saves goes to host memory and comes back in backward, without overlap."""

    def forward(images: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
            return encoder(images)

    return forward


def deepspeed_cpu_checkpointing(encoder: nn.Module) -> Forward:
    """DeepSpeed's `cpu_checkpointing`: each block's input goes to host memory, the block is computed again in backward.

    Copies run on a stream of their own on a GPU, from 0.19 on. DeepSpeed leaves autocast out of the second computation;
    here it is as in the first. As with all peers that wrap blocks, the encoder stays in its present mode (train, eval).

    Raises:
        ImportError: DeepSpeed is not installed.
        ValueError: the encoder is on a CPU, where DeepSpeed empties what it saved, or has no repeated blocks; in the
            forward, a block's input requires no gradient.
    """
    device = next(encoder.parameters()).device
    if device.type == "cpu":
        raise ValueError("cpu_checkpointing must have the encoder on an accelerator, got cpu. HINT: encoder.cuda().")
    checkpointing: Any = importlib.import_module("deepspeed.runtime.activation_checkpointing.checkpointing")
    # As checkpointing.configure() does, which asks for the process group's rank besides, to log it.
    checkpointing.CPU_CHECKPOINT = True
    sharing_copy = _sharing_copy(encoder)
    for name, block in repeated_blocks(sharing_copy):
        sharing_copy.set_submodule(name, _DeepSpeedBlock(name, block, checkpointing.checkpoint))
    return sharing_copy


class _DeepSpeedBlock(nn.Module):
    """A block under DeepSpeed's checkpoint function."""

    def __init__(self, name: str, block: nn.Module, checkpointed: Callable[..., Tensor]) -> None:
        super().__init__()
        self.name, self.block, self.checkpointed = name, block, checkpointed

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        if torch.is_grad_enabled() and not x.requires_grad:
            raise ValueError(
                f"the input of block {self.name} must require a gradient, or DeepSpeed gives the block none. "
                "HINT: let what is before it learn."
            )
        kind = x.device.type
        settings: dict[str, Any] = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}

        def block(*inputs: Any) -> Tensor:
            with torch.autocast(kind, **settings):
                return self.block(*inputs)

        return self.checkpointed(block, x, *others)


def accelerate_offload(encoder: nn.Module) -> Forward:
    """Accelerate's `activation_checkpointing_offload` (FSDP2): checkpointed blocks, whose inputs go to host memory.

    What Accelerate does to a model before it shards it, on the blocks' class; nothing is sharded.

    Raises:
        ImportError: Accelerate is not installed, or has no such option (before 1.15).
        ValueError: the encoder has no repeated blocks, or draws random numbers: Accelerate draws others in backward.
    """
    drawing = [name for name, module in encoder.named_modules() if _draws(module)]
    if drawing:
        raise ValueError(
            f"the encoder must draw no random numbers (Accelerate draws others in backward), got {drawing[0]}. "
            "HINT: rates of 0."
        )
    sharing_copy = _sharing_copy(encoder)
    accelerate, fsdp = importlib.import_module("accelerate"), importlib.import_module("accelerate.utils.fsdp_utils")
    given: dict[str, Any] = {"activation_checkpointing": True, "activation_checkpointing_offload": True}
    if given.keys() - inspect.signature(accelerate.FullyShardedDataParallelPlugin).parameters.keys():
        raise ImportError(f"Accelerate must be 1.15 or later, got {accelerate.__version__}. HINT: pip install -U it.")
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted({type(block).__name__ for _, block in repeated_blocks(sharing_copy)}),
        **given,
    )
    return fsdp.fsdp2_apply_ac(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), sharing_copy)


def _draws(module: nn.Module) -> bool:
    return module.training and any((getattr(module, rate, None) or 0.0) > 0.0 for rate in ("p", "drop_prob"))


def transformers_checkpointing(encoder: nn.Module) -> Forward:
    """Transformers' checkpoints of the Transformers models in the encoder; their inputs in host memory since 5.24.

    Raises:
        ValueError: there is no such model in the encoder.
    """
    sharing_copy = _sharing_copy(encoder)
    models = [module for module in sharing_copy.modules() if hasattr(module, "gradient_checkpointing_enable")]
    if not models:
        raise ValueError(
            f"the encoder must hold a Transformers model, got {type(encoder).__name__}. HINT: transformers.ViTModel."
        )
    for model in models:
        enable: Any = getattr(model, "activation_checkpointing_enable", None)
        if enable and "offload" in inspect.signature(enable).parameters:
            enable(offload=True)
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return sharing_copy


class TransformersViT(nn.Module):
    """A ViT of Transformers as an encoder: the class token's features of images [N, 3, S, S].

    Args:
        sizes: arguments of transformers.ViTConfig.
    """

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        transformers = importlib.import_module("transformers")
        self.model = transformers.ViTModel(transformers.ViTConfig(**sizes), add_pooling_layer=False)
        self.num_features: int = self.model.config.hidden_size

    def forward(self, images: Tensor) -> Tensor:
        """Features [N, hidden_size]."""
        return self.model(images).last_hidden_state[:, 0]


def torch_memory_budget(encoder: nn.Module, budget: float, backend: str = "inductor") -> Forward:
    """torch.compile with `activation_memory_budget`: the share of activations that its partitioner keeps.

    Args:
        encoder: anything that compiles as one graph.
        budget: the share, in [0, 1], of what the compiled encoder saves by default; 0 checkpoints the whole.
        backend: a backend of torch.compile with a partitioner: "inductor", or "aot_eager", which compiles no kernel.

    Raises:
        ValueError: in the forward, a dispatch mode is on, and torch.compile would run the encoder as it is.
    """
    config = importlib.import_module("torch._functorch.config")
    torch._dynamo.reset()  # a graph of another budget would be found again
    compiled = torch.compile(_sharing_copy(encoder), backend=backend, fullgraph=True)

    def forward(images: Tensor) -> Tensor:
        mode = _get_current_dispatch_mode()
        if mode is not None:
            raise ValueError(
                f"torch.compile must run without a dispatch mode, got {type(mode).__name__}. HINT: leave its context."
            )
        with config.patch(activation_memory_budget=budget):
            return compiled(images)

    return forward


def trl_offload(encoder: nn.Module) -> Forward:
    """TRL's activation offload: what autograd saves goes to host memory and comes back on a stream of its own.

    TRL's trainers have backward within its context too; here it waits for its copies after the forward.

    Raises:
        ImportError: TRL is not installed.
        ValueError: there is no accelerator.
    """
    try:
        offloading = importlib.import_module("trl.models.activation_offloading")
    except ImportError as error:
        raise ImportError(f"TRL must be installed, got: {error}. HINT: pip install trl.") from error
    if not torch.accelerator.is_available():
        raise ValueError("TRL's activation offload must have an accelerator, got none. HINT: another peer.")
    sharing_copy = _sharing_copy(encoder)
    context = offloading.get_act_offloading_ctx_manager(sharing_copy, warn_if_no_head=False)

    def forward(images: Tensor) -> Tensor:
        with context:
            return sharing_copy(images)

    return forward


def repeated_blocks(encoder: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of what the encoder repeats: of a class that lists of its modules hold at least twice.

    Raises:
        ValueError: there are none.
    """
    lists = (nn.Sequential, nn.ModuleList)
    held = Counter(
        type(child)
        for parent in encoder.modules()
        if isinstance(parent, lists)
        for child in parent
        if not isinstance(child, lists) and any(True for _ in child.children())
    )
    blocks: list[tuple[str, nn.Module]] = []
    for name, module in encoder.named_modules():
        if held[type(module)] > 1 and not any(name.startswith(f"{outer}.") for outer, _ in blocks):
            blocks.append((name, module))
    if not blocks:
        raise ValueError(f"the encoder must repeat a block, {type(encoder).__name__} does not. HINT: torch_checkpoint.")
    return blocks


def _sharing_copy(encoder: nn.Module) -> nn.Module:
    """A copy of its own modules and hooks, with the encoder's parameters and buffers."""
    shared = (*encoder.parameters(), *encoder.buffers())
    return copy.deepcopy(encoder, {id(tensor): tensor for tensor in shared})


def lightstream_module(stages: int = 4) -> nn.Module:
    """A ResNet-18 without its head, with the first `stages` of its layers and its norms frozen, as lightstream needs.

    The norms' own weights are frozen too: lightstream adds their gradients up over overlapping tiles.
    """
    net = torchvision.models.resnet18(weights=None)
    layers = (net.layer1, net.layer2, net.layer3, net.layer4)[:stages]
    encoder = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, *layers).eval()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return encoder


def lightstream_stream(encoder: nn.Module, image_px: int, tile_px: int) -> Forward:
    """One image [1, 3, image_px, image_px] through lightstream's StreamingCNN, in tiles of tile_px.

    With frozen norms it equals `native` in output and in the convolutions' gradients, in the encoder's dtype (autocast
    is off): to 1e-13 in float64, to 1e-2 in float32, where a ReLU near zero may take the other side. Tiles, and what
    the image is larger than them by, are multiples of the encoder's stride. ResNet-18 needs tiles of 104, 240, 496 or
    1,024 px up to layer 1, 2, 3 or 4; a tile covers new ground only by what it is larger than 100, 232, 480 and 992, so
    that small ones are slow. The image gets no gradient.

    Raises:
        ImportError: lightstream or what it imports is not installed.
        ValueError: lightstream would be wrong with this encoder, image or tile, most often without saying so.
    """
    if any(_learns(module) for module in encoder.modules()):
        raise ValueError(
            "the encoder's BatchNorm must be frozen, got one that learns. HINT: take lightstream_module()."
        )
    if not 0 < tile_px <= image_px:
        raise ValueError(f"tile_px must be in [1, image_px={image_px}], got {tile_px}. HINT: smaller tiles.")
    stream = _streaming_cnn(encoder, tile_px)
    stride, lost, unlearned = int(stream.output_stride[1]), stream.tile_output_lost, stream.tile_gradient_lost
    if tile_px % stride or (image_px - tile_px) % stride:
        raise ValueError(
            f"image_px and tile_px must be multiples of the encoder's stride {stride}, got {image_px} and {tile_px}. "
            f"HINT: {image_px // stride * stride} and {tile_px // stride * stride}."
        )
    # In too small a tile every pixel sees a border, and the widths that lightstream measures are wrong: the gradient
    # then seems to lose less than the output does.
    if unlearned.top < lost.top * stride or tile_px - unlearned.top - unlearned.bottom < stride:
        raise ValueError(f"tile_px must exceed the encoder's receptive field, got {tile_px}. HINT: larger tiles.")

    def forward(image: Tensor) -> Tensor:
        if image.shape != (1, 3, image_px, image_px):
            raise ValueError(
                f"the image must be [1, 3, {image_px}, {image_px}], got {list(image.shape)}. HINT: crop it."
            )
        with torch.autocast(image.device.type, enabled=False):
            output = stream(image)

        def backward(gradient: Tensor) -> None:
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that its autocast is off, in every tile
                stream.backward(image, gradient)

        # Its backward is a method of its own: it runs when the caller's backward reaches the output.
        output.requires_grad_().register_hook(backward)
        return output

    return forward


def _learns(module: nn.Module) -> bool:
    if not isinstance(module, nn.BatchNorm2d):
        return False
    return module.training or any(parameter.requires_grad for parameter in module.parameters())


def _streaming_cnn(encoder: nn.Module, tile_px: int) -> Any:
    """The package's StreamingCNN over a copy of the encoder that shares its parameters."""
    try:
        constructor_module = importlib.import_module("lightstream.core.constructor")
    except ImportError as error:
        raise ImportError(
            f"lightstream must be installed, got: {error}. "
            "HINT: pip install lightstream lightning (it imports the latter without asking for it)."
        ) from error
    device = next(encoder.parameters()).device
    # It measures on the CPU, in full precision, what a tile loses at its borders; its own option to do so then calls
    # .cuda(), and without the option the constructor does: hence the attribute. It prints, and leaves gradients on.
    with redirect_stdout(io.StringIO()), torch.set_grad_enabled(torch.is_grad_enabled()):
        constructor = constructor_module.StreamingConstructor(
            copy.deepcopy(encoder).cpu(), tile_px, verbose=False, statistics_on_cpu=True, normalize_on_gpu=False
        )
        constructor.statistics_on_cpu = False
        constructor.add_modules_to_keep([nn.BatchNorm2d])  # its ResNets do so too; residual sums fail without
        stream = constructor.prepare_streaming_model()
    stream.to(device)
    stream.device = device
    for name, parameter in encoder.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(stream.stream_module.get_submodule(owner), leaf, parameter)
    return stream
