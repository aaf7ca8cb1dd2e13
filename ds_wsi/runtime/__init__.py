"""Process group, seeding, memory counters, atomic files and logging."""
