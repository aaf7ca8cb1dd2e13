"""What launch/benchmark.py measures: one module a name, each with `measure(quick, ...) -> Result`."""
