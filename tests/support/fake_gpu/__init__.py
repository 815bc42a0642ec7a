"""An sm_90 GPU that is played to Triton: kernels are specialised by the real JIT from the real arguments of a call (on
CPU tensors), compiled by ptxas and checked against the limits of the chip; a launch does nothing.

The interpreter takes no branch that the data do not take, and the signatures of `aot_cases()` are written by hand:
neither sees what a call really compiles. Triton decides at its import whether kernels are interpreted, so this runs in
processes of its own: `python -m support.fake_gpu <what> ...` (`__main__.py`), started by `processes.py`.
"""
