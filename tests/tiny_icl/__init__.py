"""A tiny causal language model that learns in context, and the tasks it was trained on."""
