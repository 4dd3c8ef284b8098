"""How good a model is on held-out text, beside simple models and a general-purpose compressor."""
