"""Which mode and chunk size each segment has: a pure decision."""
