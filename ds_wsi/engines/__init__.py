"""The only importers of DeepSpeed and Accelerate."""
