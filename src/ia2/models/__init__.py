"""A base model and what is read of it: forward passes, generation, attention activations."""
