"""The subcommands of `ds-wsi`: each has `add_<command>`, its options, and `run_<command>`.

Nothing is imported here: `ds-wsi --help` lists them without their libraries.
"""

# Command -> (the module of its `add_<command>`, what it does), in the order of work.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "start here: make the demo cohort; --compare trains on it with and without encoder"),
    "manifest": ("manifest", "write the manifest of a public dataset"),
    "tile": ("tile", "write each slide's tile coordinates"),
    "features": ("features", "write each slide's features, to train on them without an encoder"),
    "plan": ("plan", "plan the partition of an encoder: modes, memory and time"),
    "train": ("train", "train a slide model"),
    "protocol": ("train", "train a dataset's splits and seeds, and print their table"),
    "evaluate": ("evaluate", "evaluate an exported model on a cohort"),
    "heatmap": ("heatmap", "draw an exported model's attention over slides"),
    "compare": ("report", "compare two runs' predictions of the same slides"),
    "report": ("report", "tables of many runs, as CSV, Markdown, LaTeX and HTML"),
    "env": ("env", "versions, devices, cores and memory, for a report of a problem"),
    "doctor": ("doctor", "check this machine: versions, device, disks, slides, engines"),
}
