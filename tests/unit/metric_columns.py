"""Hypothesis' columns of small numbers, for metrics beside other libraries'."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

few = settings(max_examples=60, deadline=None, derandomize=True)


def columns(*values):
    """Lists of one length of such values, as one list of tuples would have them."""
    return st.lists(st.tuples(*values), min_size=1, max_size=12).map(lambda rows: [np.array(x) for x in zip(*rows)])
