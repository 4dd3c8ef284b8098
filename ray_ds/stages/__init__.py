"""The stages: one file each, its main path readable from top to bottom."""
