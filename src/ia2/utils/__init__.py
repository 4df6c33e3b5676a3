"""What every part uses, and what knows nothing of models: files, errors, messages, processes."""
