"""From files, folders and the hub to examples: rows, labels, splits, benchmarks."""
