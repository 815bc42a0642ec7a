"""The packed engine: transformer blocks over packed rows. It knows no model."""
