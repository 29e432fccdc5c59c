"""The packaged demo: real handwritten digits, a small classifier trained on them, and the config of a run."""
