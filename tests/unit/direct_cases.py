"""The direct reader's proof of a file, for its tests."""

import openslide

from ds_wsi.slides.direct.proof import prove
from ds_wsi.slides.direct.reader import DirectTiff


def proved(path):
    """Why the file is not read directly, or None where it is."""
    with openslide.OpenSlide(path) as handle, DirectTiff(path) as direct:
        return prove(direct, handle)
