"""An ImageNet-size extraction through the ordinary command line: does it complete, and what does it cost.

1,281,167 pictures of 8 × 8 pixels in 1,282 shards, a net of two small convolutions, integrated gradients with 10 steps,
two layers. Every step is a command that a user would type (`shards pack`, `extract`, `store verify`, `store digest`),
run as a process of its own. Meanwhile a line is written every few seconds to OUT/observations.jsonl: shards that are
done, memory of the driver and of the actors (proportional set size), and the driver's CPU time.

Resumable: run the same command again after anything has ended it. Steps that are done are skipped, extraction goes on
where it stopped, and observations are appended. Meant to run detached:

    nohup python -m benchmarks.scale --out /somewhere/scale > scale.log &
    python -m benchmarks.scale --out /somewhere/small --count 20000

Prints a table for people and one JSON line for machines. *Coordinator cost per shard* is the driver's CPU time
(both user and system) per shard that ended, between the first and the last observation in which shards were running;
*memory growth* compares the second tenth of the observations with the last tenth.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

IMAGENET = 1_281_167
PER_SHARD = 1000
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def main() -> int:
    """Pack, extract under observation, verify; print."""
    arguments = _arguments()
    out = Path(arguments.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    _pack(out, arguments)
    config = out / "config.yaml"
    config.write_text(yaml.safe_dump(_config(out, arguments), sort_keys=False))
    shards = -(-arguments.count // arguments.samples_per_shard)
    code = _extract_observed(config, out, arguments.seconds_between)
    if code:
        print(f"extract ended with code {code}: run the same command again to go on", file=sys.stderr)
        return code
    started = time.monotonic()
    _command("store", "verify", str(out / "run"))
    verified = time.monotonic() - started
    digest = _command("store", "digest", str(out / "run")).split()[-1]
    result = _evaluate(out, shards) | {"verify_seconds": round(verified, 1), "digest": digest}
    result = {"benchmark": "scale", "images": arguments.count, "shards": shards, "actors": arguments.actors} | result
    for name, value in result.items():
        print(f"{name:>32}  {value}")
    print(json.dumps(result))
    return 0


def _pack(out: Path, arguments: argparse.Namespace) -> None:
    shards = out / "shards"
    if (shards / "index.parquet").exists():
        return
    # A pack that was interrupted is begun anew.
    shutil.rmtree(shards, ignore_errors=True)
    print(f"packing {arguments.count:,} images into {shards}", file=sys.stderr, flush=True)
    _command(
        "shards", "pack", "shapes", str(shards), "--count", str(arguments.count), "--size", str(arguments.size),
        "--samples-per-shard", str(arguments.samples_per_shard),
    )  # fmt: skip


def _config(out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    preprocessing = {"size": arguments.size, "channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    return {
        "run": {"directory": str(out / "run"), "name": "scale"},
        "data": {"shards": str(out / "shards")},
        "model": {"spec": "module:benchmarks.nets:minimal", "weights": "none", "preprocessing": preprocessing},
        "attribution": {
            "layers": ["first", "second"],
            "method": {"name": "integrated_gradients", "options": {"steps": 10}},
            "microbatch": 250,
        },
        "cluster": {"actors": arguments.actors},
        "tracking": {"mode": "disabled"},
    }


def _command(*words: str) -> str:
    """The output of a command of `codec-dist`; its stderr is shown."""
    done = subprocess.run([sys.executable, "-m", "codec_dist", *words], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


# --- observation -----------------------------------------------------------------------------------------------------


def _extract_observed(config: Path, out: Path, seconds_between: float) -> int:
    command = [sys.executable, "-m", "codec_dist", "extract", str(config)]
    with subprocess.Popen(command) as driver, (out / "observations.jsonl").open("a") as file:
        try:
            while True:
                try:
                    return driver.wait(seconds_between)
                except subprocess.TimeoutExpired:
                    file.write(json.dumps(_observe(driver.pid, out / "run")) + "\n")
                    file.flush()
        except BaseException:
            driver.terminate()
            raise


def _observe(driver: int, run: Path) -> dict[str, Any]:
    names = _processes_below(driver)
    actors = [pid for pid, name in names.items() if name.startswith("ray::ShardWorker")]
    ledger = run / "store" / "ledger"
    done = sum(entry.name.endswith(".json") for entry in os.scandir(ledger)) if ledger.exists() else 0
    return {
        "time": round(time.time(), 2),
        "driver": driver,
        "shards": done,
        "driver_cpu_seconds": _cpu_seconds(driver),
        "driver_mb": _megabytes(driver),
        "actors_mb": [_megabytes(pid) for pid in sorted(actors)],
    }


def _processes_below(root: int) -> dict[int, str]:
    parents, names = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            pid = int(entry.name)
            parents[pid] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            names[pid] = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue  # ended meanwhile
    found = {root}
    while new := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= new
    return {pid: names.get(pid, "") for pid in found}


def _cpu_seconds(pid: int) -> float | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / TICKS


def _megabytes(pid: int) -> float | None:
    """Proportional set size: pages that processes share are divided among them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("Pss:")), None)


# --- evaluation ------------------------------------------------------------------------------------------------------


def _evaluate(out: Path, shards: int) -> dict[str, Any]:
    file = out / "observations.jsonl"
    observations = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    # Runs that were interrupted are told apart by their drivers.
    runs: dict[int, list[dict[str, Any]]] = {}
    for each in observations:
        if 0 < each["shards"] < shards and each["driver_cpu_seconds"] is not None and each["actors_mb"]:
            runs.setdefault(each["driver"], []).append(each)
    spans = [(run[0], run[-1]) for run in runs.values() if run[-1]["shards"] > run[0]["shards"]]
    done = sum(last["shards"] - first["shards"] for first, last in spans)
    seconds = sum(last["time"] - first["time"] for first, last in spans)
    cpu = sum(last["driver_cpu_seconds"] - first["driver_cpu_seconds"] for first, last in spans)
    longest = max(runs.values(), key=len, default=[])
    return {
        "runs": len(runs),
        "seconds_per_shard": round(seconds / done, 3) if done else None,
        "coordinator_ms_per_shard": round(1000 * cpu / done, 2) if done else None,
        "driver_mb": _then_and_now([each["driver_mb"] for each in longest]),
        "largest_actor_mb": _then_and_now([max(filter(None, each["actors_mb"]), default=0) for each in longest]),
    }


def _then_and_now(values: list[float]) -> dict[str, float] | None:
    """Early (second tenth), late (last tenth), peak and growth."""
    tenth = len(values) // 10
    if not tenth:
        return None
    early, late = statistics.median(values[tenth : 2 * tenth]), statistics.median(values[-tenth:])
    return {
        "early": round(early, 1),
        "late": round(late, 1),
        "peak": round(max(values), 1),
        "growth": round(late / early - 1, 4),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the shards and the run")
    parser.add_argument("--count", type=int, default=IMAGENET, help="images [%(default)s]")
    parser.add_argument("--size", type=int, default=8, help="height and width of the images [%(default)s]")
    parser.add_argument("--samples-per-shard", type=int, default=PER_SHARD, help="[%(default)s]")
    parser.add_argument("--actors", type=int, default=os.cpu_count(), help="[one per CPU: %(default)s]")
    parser.add_argument("--seconds-between", type=float, default=5.0, help="observations [%(default)s]")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
