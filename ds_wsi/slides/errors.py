"""What a slide that cannot be used, or a tile that cannot be read, is told with."""


class SlideError(ValueError):
    """A slide that cannot be used; the message names it, the reason and the remedy."""


class TileReadError(SlideError):
    """A tile that could not be read.

    Attributes:
        slide_id, x, y: the slide and the tile's top left, level-0 px.
        cause: the error below.
    """

    def __init__(self, slide_id: str, x: int, y: int, cause: Exception) -> None:
        self.slide_id, self.x, self.y, self.cause = slide_id, x, y, cause
        super().__init__(f"tile at ({x}, {y}) of slide {slide_id} must be readable, got {cause}")

    def __reduce__(self) -> tuple[type, tuple[str, int, int, Exception]]:
        # An exception is pickled with its message as the only argument, which this class could not be made from.
        return type(self), (self.slide_id, self.x, self.y, self.cause)
