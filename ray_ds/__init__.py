"""ray_ds: from raw text to a served language model on a Ray cluster."""

__version__ = "0.1.0"
