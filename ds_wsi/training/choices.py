"""What can be chosen of a training, by name; help pages need no torch for it."""

SCHEDULES = ("cosine", "linear", "constant", "exponential")
