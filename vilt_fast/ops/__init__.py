"""One file per op: validation at the public edge, choice of backend, and the torch op that native backends run in."""
