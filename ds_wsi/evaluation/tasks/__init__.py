"""A model's answers to another task than classification: measured, written and drawn."""
