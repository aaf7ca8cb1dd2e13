"""Many families of vision models through `partition_layers`: `python -m tests.zoo.sweep`."""
