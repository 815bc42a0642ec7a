"""Launchers of the CUDA kernels in `vilt_fast._C`, an op a file; `_cuda.py` holds what they share."""
