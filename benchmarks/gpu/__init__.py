"""The GPU campaign: everything that only a GPU can tell."""
