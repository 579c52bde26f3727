"""Where a model's weights come from. Imports nothing of `worker`."""
