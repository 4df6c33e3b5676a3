"""What is trained: adapter types, and how their weights are put on, switched off, kept and read."""
