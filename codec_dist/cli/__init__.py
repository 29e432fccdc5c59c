"""The command line: `codec-dist` and `python -m codec_dist`; an error of the user is one line and exit code 2."""

from codec_dist.cli.main import main

__all__ = ["main"]
