"""The HF Trainer, and slide models as Transformers models."""
