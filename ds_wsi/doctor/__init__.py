"""What this machine has, and whether it can do what ds_wsi asks of it.

A check is a plain function that returns a `Finding`. What could hang or crash (a device, a library of C code, other
ranks, an engine) runs in processes of its own (`apart`), so that the check fails and the next one runs. The process
that runs the checks imports no torch: a broken torch is a finding too.
"""
