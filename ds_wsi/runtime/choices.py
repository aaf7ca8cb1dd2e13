"""The precisions that the encoder can compute in, by Accelerate's names; help pages need no torch for them."""

PRECISIONS = ("no", "bf16", "fp16")


def precision_words(precision: str) -> str:
    """A key of `PRECISIONS` for people to read."""
    return "float32" if precision == "no" else f"{precision} mixed precision"
