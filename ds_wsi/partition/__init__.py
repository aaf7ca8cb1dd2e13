"""Partitioned layers: exact training of activations larger than the device."""
