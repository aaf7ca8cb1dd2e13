"""The only importers of DeepSpeed, Accelerate and Transformers."""
