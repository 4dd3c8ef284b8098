"""The parts of `jobs.bench.serve`: the systems it measures, each a program of its own, and its load on an endpoint."""
