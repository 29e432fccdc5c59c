"""The command line: `codec-dist` and `python -m codec_dist`; a fault of the user's is one line and exit code 2."""

from codec_dist.cli.main import main

__all__ = ["main"]
