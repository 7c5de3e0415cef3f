"""Thin processes: wiring and I/O only."""
