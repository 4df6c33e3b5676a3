"""Grids of experiments: cells, how they are run, and tables of what came out."""
