"""A user's module as a partition finds it: what it is called with, what it returns, what stands around its call."""
