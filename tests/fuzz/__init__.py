"""Damaged files for every reader: `pytest -m fuzz` (see CONTRIBUTING.md)."""
