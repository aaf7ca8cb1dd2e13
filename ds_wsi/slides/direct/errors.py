"""What the direct reader leaves to OpenSlide."""


class NotDirectError(OSError):
    """A file, or a region of one, that is not read directly; the message is the reason, in one line.

    An OSError, so that whoever catches what a reading of a slide can fail with catches this too.
    """
