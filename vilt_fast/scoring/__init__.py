"""Many texts with many images: scores of pairs, each text and image prepared once."""
