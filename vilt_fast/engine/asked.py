"""What a user has asked for and may not get: that is said once, with the reason."""

from __future__ import annotations

import warnings

import torch


class Asked:
    """An option of `accelerate`, and what it keeps from call to call; `insists`: somebody has asked for it."""

    def __init__(self, option: str, insists: bool = True):
        self._option = option
        self.insists = insists
        self._said = False

    def say(self, but: str) -> None:
        """Warn, once, that it was asked for, `but` something is not as a user would expect."""
        if self.insists:
            self._warn(f"{self._option} was asked for, but {but}")

    def say_without(self, who: str, reason: str) -> None:
        """Warn, once, that `who` ("block 3 (ViltLayer)") does without it."""
        self.say(f"{who} does without: {reason}")

    def say_failed(self, reason: str) -> None:
        """Warn, once, whether it was asked for or not, that it has failed and is off from now on."""
        self._warn(f"{self._option} is off from now on: {reason}")

    def _warn(self, text):
        if self._said or torch.compiler.is_compiling():
            return
        self._said = True
        warnings.warn(f"vilt_fast: {text}. This is said once; vilt_fast.explain says all.", stacklevel=2)
