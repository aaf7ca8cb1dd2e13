"""Whether a partition gives what the module gives: tried at the first call."""
