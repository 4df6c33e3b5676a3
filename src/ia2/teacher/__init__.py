"""The base model with demonstrations in its prompt, and the activations that are kept of it."""
