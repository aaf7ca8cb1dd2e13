"""What a recording refuses."""


class UnrecordedError(Exception):
    """What was called cannot be recorded; `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ForbiddenError(ValueError):
    """The module does what no partition may do: a sentence for its user."""
