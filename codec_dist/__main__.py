"""`python -m codec_dist` is the same as `codec-dist`."""

import sys

from codec_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
