"""Launchers of the native CPU library `vilt_fast._C`, an op a file; `_native.py` holds what they share."""
