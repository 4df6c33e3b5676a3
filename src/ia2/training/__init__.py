"""Stages: objectives, the order of rows, the trainer, and what a recipe does one after the other."""
