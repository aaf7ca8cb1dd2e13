"""Gradient compression: top-k with error feedback, its wire format, and the exchanges between ranks."""
