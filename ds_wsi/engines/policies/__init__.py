"""What the policies change in a model before an engine wraps it."""
