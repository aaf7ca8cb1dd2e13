"""What can be chosen of engines and kernels, by name, with defaults; help pages need no torch for it."""

OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}  # name -> class of torch.optim
LEARNING_RATE, WEIGHT_DECAY = 3e-4, 1e-4
TF32 = ("torch", "yes", "no")
MEMORY_FORMATS = ("auto", "contiguous", "channels_last")
