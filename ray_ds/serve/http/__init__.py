"""The engine behind OpenAI's completions API; the only place that knows FastAPI."""
