"""The mode and the chunk size of each segment: a pure decision."""
