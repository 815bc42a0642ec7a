"""Words and patches: `align` finds what belongs together, `draw` shows it."""
