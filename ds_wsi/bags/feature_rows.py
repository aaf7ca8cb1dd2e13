"""Rows of features on disk, as answers to requests: read, or taken from memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ds_wsi.bags.features import FeatureFile, FeatureFileError, read_features
from ds_wsi.bags.joined import JoinedGrid, Place, place_of, shares_of, some_grid
from ds_wsi.bags.manifest import SlideEntry
from ds_wsi.bags.requests import TileChunk, TileRequest, tell_nobody
from ds_wsi.bags.workers import Answer


class FeatureRows(Dataset[TileChunk]):
    """Answers requests with rows of features; a file is read whole, and its rows are all there or an error is raised.

    What the files' memory holds is not read. Only `keep` adds to that: reading processes would each hold a copy.

    Args:
        slides: the cohort's, row by row.
        files: a file each; a patient's bag has several.
    """

    def __init__(self, slides: Sequence[SlideEntry], files: Sequence[FeatureFile] | Sequence[JoinedGrid]) -> None:
        self.slides, self.files = slides, files
        self.tell: Callable[[int], None] = tell_nobody

    def answer(self, request: TileRequest) -> Answer:
        """A request's answer as a worker hands it over."""
        return Answer(self[request].tiles, ())

    def held(self, request: TileRequest) -> Answer | None:
        """The answer to a request, where the features of all its files are in memory."""
        parts: list[Tensor] = []
        for file, rows in shares_of(self.files[request.slide], request.grid_rows):
            assert isinstance(file, FeatureFile)
            features = None if file.memory is None else file.memory.get(file.path)
            if features is None:
                return None
            parts.append(_rows_of(features, rows))
        return Answer(_together(parts), ()) if parts else None

    def keep(self, chunk: TileChunk) -> None:
        """Have the features of a bag's files kept in memory, where all of them were asked for and there is room."""
        joined = self.files[chunk.request.slide]
        if chunk.request.rows is not None or len(chunk.tiles) != len(joined):
            return
        start = 0
        for file, rows in shares_of(joined, range(len(joined))):
            assert isinstance(file, FeatureFile)
            if file.memory is not None:
                file.memory.keep(file.path, chunk.tiles[start : start + len(rows)])
            start += len(rows)

    def describe(self, request: TileRequest, row: int) -> str:
        """The file of a request, in words."""
        tile_place = self._place(request, row if row >= 0 else next(iter(request.grid_rows), 0))
        assert isinstance(tile_place.grid, FeatureFile)
        return f"features of slide {tile_place.entry.slide_id} ({tile_place.grid.path})"

    def __getitem__(self, request: TileRequest) -> TileChunk:
        """Read the rows of one request."""
        parts: list[Tensor] = []
        for file, rows in shares_of(self.files[request.slide], request.grid_rows):
            assert isinstance(file, FeatureFile)
            features = read_features(file.path).features
            if features.shape != (file.n_rows, file.width):
                raise FeatureFileError(
                    f"features must be as they were at the start, {[file.n_rows, file.width]}, got "
                    f"{list(features.shape)} ({file.path}). HINT: do not change files under a run."
                )
            parts.append(_rows_of(features, rows))
        if not parts:  # other ranks hold the bag
            some = some_grid(self.files)
            assert isinstance(some, FeatureFile)
            return TileChunk(request, torch.empty(0, some.width), ())
        return TileChunk(request, _together(parts), ())

    def _place(self, request: TileRequest, row: int) -> Place:
        return place_of(self.slides[request.slide], self.files[request.slide], row)


def _together(parts: Sequence[Tensor]) -> Tensor:
    """A bag's features, of one file without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _rows_of(features: Tensor, rows: Sequence[int]) -> Tensor:
    """The rows that are asked for; all of them without a copy."""
    if len(rows) == len(features):
        return features
    # The rows are copied, because with a view the whole file would be handed over to the training process.
    return features[list(rows)]
