"""A model over HTTP: `vilt-fast serve`. Nothing imports it but that command."""
