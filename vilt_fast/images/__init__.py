"""From an image to the pixels that a model takes: HuggingFace's ViLT image processor, faster; knows no model."""
