"""Figures, each made from data that a run folder holds (matplotlib)."""
