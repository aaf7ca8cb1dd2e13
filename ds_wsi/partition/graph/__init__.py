"""A module as a graph of operations, cut into segments, and one chunk through a part of it."""
