"""From a command to its results: run folders, adapt, compare, probe, predict."""
