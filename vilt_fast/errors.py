"""The exception that bad inputs raise."""


class InputError(ValueError, RuntimeError, IndexError):
    """An input that ViLT cannot be computed on; the message says what was given and what to do.

    The reference implementations raise `ValueError`, `RuntimeError` or `IndexError` for these, depending on which
    tensor operation happens to fail first. Deriving from all three keeps every existing `except` clause working.
    """
