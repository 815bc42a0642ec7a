"""Launchers that are not Triton: ``cpp`` (the native library) and ``sdpa`` (PyTorch's own fused attention)."""
