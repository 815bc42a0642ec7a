"""ViLT: HuggingFace's classes and the original repository's."""
