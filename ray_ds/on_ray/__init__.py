"""Adapters to Ray: the only code besides `stages/` and `submit.py` that knows it."""

NO_AUTO_CONNECT = {"RAY_ENABLE_AUTO_CONNECT": "0"}
"""Environment in which a call of Ray fails where the process is not connected, or no more. Ray starts a whole cluster
there otherwise, from a thread that outlives the connection too. Ray 2.60 reads it when it is imported
(_private/auto_init_hook.py)."""
