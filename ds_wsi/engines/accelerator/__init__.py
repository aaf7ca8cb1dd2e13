"""Accelerate's engines: built, one after the other in one set of processes, or one step at a time."""
