"""What a bag is asked: losses of survival, real-valued, ordered and multiple targets, and what they are divided by.

Pure functions of outputs and targets. A loss is a sum over a stack's labelled bags (`sums`), and its denominator
belongs to the whole step (`denominators`), so that any split into micro-batches, stacks and ranks has one process's
gradient. Cox's partial likelihood is no such sum: it couples the step's bags by their scores (`cox`).
"""
