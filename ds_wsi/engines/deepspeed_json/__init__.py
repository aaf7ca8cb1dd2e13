"""The DeepSpeed JSON: read, and filled in."""
