"""What can be chosen of precisions, kernels and optimizers, by name; help pages need no torch for it."""

PRECISIONS = ("no", "bf16", "fp16")  # by Accelerate's names
OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}  # name -> class of torch.optim
LEARNING_RATE, WEIGHT_DECAY = 3e-4, 1e-4
TF32 = ("torch", "yes", "no")
MEMORY_FORMATS = ("auto", "contiguous", "channels_last")


def precision_words(precision: str) -> str:
    """A key of `PRECISIONS` for people to read."""
    return "float32" if precision == "no" else f"{precision} mixed precision"
