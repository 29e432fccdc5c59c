"""Runs the Python blocks of pages, each page in a namespace and a folder of its own, and says what came of them.

Called by the tests as ``python run_pages.py RESULTS FOLDER PAGE...``, in a process of its own: pages register targets
and architectures, and change the current folder.
"""

import contextlib
import io
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from docs_pages import ROOT, blocks

PRELUDES = Path(__file__).parent / "preludes"


def run_page(page: Path, folder: Path) -> dict[str, Any]:
    """Run a page's blocks in order, as a script in ``folder`` would; stops at the first that fails.

    What the page takes for granted, such as a model, comes from the prelude of the same name.
    """
    import torch

    folder.mkdir(parents=True)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    started, output, error, run = time.monotonic(), io.StringIO(), None, 0
    try:
        with contextlib.redirect_stdout(output):
            prelude = PRELUDES / f"{page.stem}.py"
            if prelude.exists():
                exec(compile(prelude.read_text("utf-8"), prelude, "exec"), namespace)
            for block in blocks(page):
                if block.language == "python" and block.not_run is None:
                    # A notebook's lines count within its cell.
                    lines_before = "" if page.suffix == ".ipynb" else "\n" * (block.line - 1)
                    exec(compile(lines_before + block.code, page, "exec"), namespace)
                    run += 1
    except Exception:  # noqa: BLE001 — whatever a page raises is the finding
        error = traceback.format_exc()
    finally:
        sys.path.remove(str(folder))
        os.chdir(ROOT)
    values = {
        name: value
        for name, value in namespace.items()
        if isinstance(value, dict | list | int | float | str) and _is_json(value)
    }
    seconds = round(time.monotonic() - started, 2)
    return {"blocks": run, "error": error, "seconds": seconds, "output": output.getvalue(), "values": values}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


if __name__ == "__main__":
    results, folder, *names = sys.argv[1:]
    # The rest of the arguments are the test's business, not that of the pages.
    del sys.argv[1:]
    found = {name: run_page(ROOT / name, Path(folder) / name.replace("/", "-")) for name in names}
    Path(results).write_text(json.dumps(found), "utf-8")
