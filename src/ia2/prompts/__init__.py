"""From examples to token ids: the answers of a task, demonstrations, chat templates."""
