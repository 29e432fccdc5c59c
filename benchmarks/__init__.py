"""Measurements against a floor taken in the same run: `python -m benchmarks.NAME --help`."""
