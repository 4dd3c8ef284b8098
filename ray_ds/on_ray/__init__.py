"""Adapters to Ray: the only code besides `stages/` and `submit.py` that knows it."""
