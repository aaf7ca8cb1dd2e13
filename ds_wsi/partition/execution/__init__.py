"""A call of a partitioned module: forward and backward, segment by segment, chunk by chunk."""
