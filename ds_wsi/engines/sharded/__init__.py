"""Modules and tensors that an engine shards over the ranks, and whole ones of them."""
