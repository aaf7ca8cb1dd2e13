"""What DeepSpeed and Accelerate need of a machine: kernels, compiled ops, a local disk, timeouts."""
