"""The same as `python -m codec_dist extract CONFIG [--section.key value ...]`, for job submission by file."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "extract")
    runpy.run_module("codec_dist", run_name="__main__", alter_sys=True)
