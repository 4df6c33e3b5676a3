"""Grids of experiments: their cells, and what runs them."""
