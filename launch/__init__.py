"""The scripts that start runs and benchmarks; nothing of it is installed."""
