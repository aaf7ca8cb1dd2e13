"""The only importers of DeepSpeed, Accelerate and Transformers.

    machine, sharded           a machine without a GPU or a compiler, the local disk; whole tensors of shards
    deepspeed_json, policies   the JSON, read and filled in; what its "ds_wsi" section changes before the engine wraps
    comm_hooks                 gradients' reduction, compressed
    accelerator, initialize    engines for `ds-wsi train`; DeepSpeed's engine for a loop of one's own
    full_state, hf             what an engine has learned, for another; the HF Trainer

Each line imports from those above it alone.
"""
