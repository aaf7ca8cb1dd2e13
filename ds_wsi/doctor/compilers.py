"""Whether DeepSpeed can compile its own optimizers; torch's serve where it cannot."""

from ds_wsi.doctor.apart import finding_apart
from ds_wsi.doctor.finding import PASS, WARN, Finding

OPS_S = 60
_REMEDY = 'pip install "deepspeed" anew, or give "torch_adam": true in optimizer.params of the DeepSpeed JSON'


def check_ops() -> Finding:
    """Whether FusedAdam and CPUAdam of DeepSpeed can be built, as far as can be told without building them."""
    return finding_apart(look_for_compilers, timeout_s=OPS_S, remedy=_REMEDY)


def look_for_compilers() -> Finding:
    """What DeepSpeed's optimizers need and lack. In a process of its own."""
    from ds_wsi.engines.machine.cpu import without_gpu
    from ds_wsi.engines.machine.ops import COMPILER, compiler_lacks, cuda_op_lacks, is_installed

    if without_gpu():
        return Finding(PASS, "no GPU: torch's optimizers serve, nothing is compiled")
    fused, on_host = cuda_op_lacks("fused_adam"), None if is_installed("cpu_adam") else compiler_lacks()
    if fused is None and on_host is None:
        return Finding(PASS, "FusedAdam and CPUAdam are there, or can be built")
    lacking = [f"FusedAdam: {fused}"] if fused else []
    lacking += [f"CPUAdam: {on_host}"] if on_host else []
    advice = (
        '`ds-wsi train` and ds_wsi.initialize take torch\'s Adam; in other code write "torch_adam": true in '
        f"optimizer.params; or install {COMPILER if on_host else 'the CUDA toolkit of that version'}"
    )
    return Finding(WARN, "; ".join(lacking), advice)
