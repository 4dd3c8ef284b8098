"""The commands of `ray-ds`, a module a group. Reading them loads neither torch nor Ray: each loads what it needs."""
