"""What happened inside: similarity of activations."""
