import pytest

from ds_wsi.runtime.words import counted


@pytest.mark.parametrize(
    ("number", "noun", "words"),
    [
        (1, "slide", "1 slide"),
        (0, "tile", "0 tiles"),
        (3000, "slide", "3,000 slides"),
        (2, "process", "2 processes"),
        (1, "process", "1 process"),
        (2, "epoch", "2 epochs"),
        (2, "batch", "2 batches"),
        (2, "entry", "2 entries"),
        (2, "key", "2 keys"),
    ],
)
def test_a_number_and_its_noun(number, noun, words):
    assert counted(number, noun) == words
