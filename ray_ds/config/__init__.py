"""Settings: one file a stage, frozen dataclasses with a docstring under each field."""
