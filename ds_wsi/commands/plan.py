"""`ds-wsi plan`: how an encoder is partitioned within the budgets, before anything is trained."""

import argparse
from contextlib import nullcontext
from pathlib import Path

from ds_wsi.commands.parser import add_command
from ds_wsi.partition.policy import POLICY_MODES, PartitionPolicy
from ds_wsi.runtime.files import write_json
from ds_wsi.runtime.own_files import begins_with, require_ours
from ds_wsi.runtime.streams import show
from ds_wsi.runtime.units import parse_bytes
from ds_wsi.training.options import spellings


def add_plan(subparsers: argparse._SubParsersAction) -> None:
    """The options of `ds-wsi plan`."""
    parser = add_command(subparsers, "plan", run_plan)
    words = "a timm model's name, or MODULE:CALLABLE of your own (default: resnet18)"
    parser.add_argument("--encoder", default="resnet18", help=words)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--tiles", type=int, help="number of tiles of a bag, which is computed in chunks of tiles")
    size.add_argument(*spellings("image_px"), type=int, help="side of one large image instead, in blocks of rows")
    parser.add_argument(*spellings("tile_size_px"), type=int, default=256, help="side of a tile (default: 256)")
    parser.add_argument(
        "--gpu", type=parse_bytes, default=None, help="its memory, such as 24GiB (default: what it has)"
    )
    parser.add_argument("--host", type=parse_bytes, default=None, help="host memory, such as 128GiB (default: free)")
    parser.add_argument(
        "--mode",
        choices=POLICY_MODES,
        default="auto",
        help="how every segment is computed (default: auto)",
    )
    parser.add_argument(*spellings("chunk_size"), type=int, help="tiles, or rows, a chunk (default: the plan chooses)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="precision in which is trained (default: fp32)",
    )
    parser.add_argument("--eval", action="store_true", help="BatchNorm takes running statistics (default: a bag's)")
    parser.add_argument("--device", default=None, help="whose rates to assume (default: cuda; cpu without --gpu)")
    parser.add_argument("--probe", action="store_true", help="measure this machine's rates first, and keep them")
    words = "search anew, and keep nothing (default: a plan of the same module, sizes, budgets and versions is read)"
    parser.add_argument("--no_keep_plans", dest="keep_plans", action="store_false", help=words)
    parser.add_argument(*spellings("output_dir"), help="folder for plan.json and plan.png (default: print alone)")


def run_plan(options: argparse.Namespace) -> None:
    """`ds-wsi plan`."""
    import torch

    from ds_wsi.models import build_encoder
    from ds_wsi.models.own import is_code
    from ds_wsi.partition.planning.draw import draw_plan
    from ds_wsi.partition.planning.rates import device_key, probe
    from ds_wsi.partition.planning.search import find_plan

    device = torch.device(options.device or ("cpu" if options.gpu is None else "cuda"))
    if options.probe:
        rates = probe(torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu")))
        show(
            f"{device_key(device)}: {rates.flops / 1e12:.3g} TFLOP/s, memory {rates.memory / 1e9:.3g} GB/s, "
            f"link {rates.link / 1e9:.3g} GB/s, {rates.launch * 1e6:.3g} us an operation"
        )
    if options.output_dir:
        for name in ("plan.json", "plan.png"):
            require_ours(Path(options.output_dir) / name, _is_ours, "--output_dir")
    if options.tiles is None and options.image_px is None:
        if options.probe:
            return
        raise ValueError("plan must be given --tiles or --image_px, got neither")
    if options.gpu is None and device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--gpu must be given where there is no GPU to ask. HINT: --gpu 24GiB.")
    # A vision transformer's positions are of one size.
    is_own = is_code(options.encoder)
    fixed = {"img_size": options.tile_size_px} if "vit" in options.encoder and not is_own else {}
    with nullcontext() if is_own else torch.device("meta"):  # a plan asks for no weight, but own code may
        encoder = build_encoder(options.encoder, tile_size_px=options.tile_size_px, **fixed).train(not options.eval)
    spatial = options.image_px is not None
    shape = (1, 3, options.image_px, options.image_px) if spatial else (options.tiles, 3, *[options.tile_size_px] * 2)
    policy = PartitionPolicy(
        mode=options.mode,
        axis="spatial" if spatial else "batch",
        chunk_size=options.chunk_size,
        gpu_budget_bytes=options.gpu,
        host_budget_bytes=options.host,
        keep_plans=options.keep_plans,
    )
    precision = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]
    answer = find_plan(encoder, shape, policy, autocast=precision, device=device)
    plan = answer.plan
    if options.output_dir:
        folder = Path(options.output_dir)
        write_json(folder / "plan.json", {"ds_wsi": {"partition": {"plan": plan.to_section()}}})
        draw_plan(plan, folder / "plan.png")
    show(plan)
    show(answer.words)
    if options.output_dir:
        show(f"written: {folder / 'plan.json'}, {folder / 'plan.png'}")


def _is_ours(path: Path) -> bool:
    """The picture is known by the JSON beside it."""
    return begins_with(path.with_suffix(".json"), '{\n  "ds_wsi": {\n    "partition": {')
