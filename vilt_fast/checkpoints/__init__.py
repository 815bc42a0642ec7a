"""Checkpoints of the original repository, read into HuggingFace's classes and written back."""
