"""Exported models, and the runtimes that they run in."""
