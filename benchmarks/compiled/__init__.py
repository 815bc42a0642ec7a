"""What compilers report of kernels for GPUs that are not there."""
