"""Entry points for `ray job submit`; recipes; benchmarks."""
