"""The tiny bundled model and the programs that make it."""
