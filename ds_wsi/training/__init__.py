"""The loop: settings, steps, checkpoints."""
