"""Conversations as tokens: a template says how, in jinja with Hugging Face's words."""
