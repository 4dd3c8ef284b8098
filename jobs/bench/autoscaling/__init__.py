"""Autoscaling measured: a simulator around Ray Serve's real decisions, and the real thing under load."""
