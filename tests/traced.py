"""The most memory that Python code takes, measured in a process that has no other threads.

In CPython 3.11 tracemalloc may crash a process in which another thread ends or begins while it is stopped
(python/cpython issue 128679), and in a test process threads of other tests' servers may still be there.
"""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, tracemalloc
{setup}
tracemalloc.start()
before = tracemalloc.get_traced_memory()[0]
{work}
print(tracemalloc.get_traced_memory()[1] - before)
"""


def peak_of(setup: str, work: str, *words: object) -> int:
    """Bytes that ``work`` takes at most, after ``setup``; both find ``words`` as texts in ``sys.argv[1:]``."""
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(setup=setup, work=work), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.splitlines()[-1])
