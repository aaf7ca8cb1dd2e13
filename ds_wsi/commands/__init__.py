"""The subcommands of `ds-wsi`: each has `add_<command>`, its options, and `run_<command>`."""
