"""The losses ViLT is trained with, on the ops of `vilt_fast.functional`."""
