"""A row to token ids: template, chat template, limits."""
