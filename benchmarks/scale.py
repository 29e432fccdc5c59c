"""An ImageNet-size extraction through the ordinary command line: does it complete, and what does it cost.

1,281,167 pictures of 8 × 8 pixels in 1,282 shards, a net of two small convolutions, integrated gradients with 10 steps,
two layers. Every step is a command that a user would type (`shards pack`, `extract`, `store verify`, `store digest`),
run as a process of its own. Meanwhile a line is written every few seconds to OUT/observations.jsonl: shards that are
done, memory of the driver and of the actors (proportional set size), and the driver's CPU time.

Resumable: run the same command again after anything has ended it. Steps that are done are skipped, extraction goes on
where it stopped, and observations are appended. Meant to run detached:

    nohup python -m benchmarks.scale --out /somewhere/scale > scale.log &
    python -m benchmarks.scale --out /somewhere/small --count 20000
    python -m benchmarks.scale --out /somewhere/memory --memory

Prints a table for people and one JSON line for machines. *Coordinator cost per shard* is the driver's CPU time
(both user and system) per shard that ended, between the first and the last observation in which shards were running;
*memory growth* compares the second tenth of the observations with the last tenth. With ``--memory`` the peaks of the
resident set (as the kernel keeps them) of the driver and of the largest actor are compared between 10,000 and 100,000
images; those of the driver include planning and finishing.
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
FEW, MANY = 10_000, 100_000
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def main() -> int:
    """Measure, print."""
    arguments = _arguments()
    out = Path(arguments.out).absolute()
    try:
        result = _compare_memory(out, arguments) if arguments.memory else _run(out, arguments.count, arguments)
    except subprocess.CalledProcessError as error:
        print(f"{error}: run the same command again to go on", file=sys.stderr)
        return 1
    for name, value in result.items():
        print(f"{name:>32}  {value}")
    print(json.dumps(result))
    return 0


def _run(out: Path, count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Pack, extract under observation, verify."""
    out.mkdir(parents=True, exist_ok=True)
    _pack(out, count, arguments)
    config = out / "config.yaml"
    config.write_text(yaml.safe_dump(_config(out, arguments), sort_keys=False))
    shards = -(-count // arguments.samples_per_shard)
    _extract_observed(config, out, arguments.seconds_between)
    started = time.monotonic()
    _command("store", "verify", str(out / "run"))
    verified = time.monotonic() - started
    digest = _command("store", "digest", str(out / "run")).split()[-1]
    result = {"benchmark": "scale", "images": count, "shards": shards, "actors": arguments.actors}
    evaluated = _evaluate(out, shards, arguments.samples_per_shard)
    return result | evaluated | {"verify_seconds": round(verified, 1), "digest": digest}


def _compare_memory(out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Peaks with few and with many images, and by what fraction they are higher with many."""
    few, many = (_run(out / str(count), count, arguments) for count in (FEW, MANY))
    result: dict[str, Any] = {"benchmark": "memory", "images": [FEW, MANY], "actors": arguments.actors}
    for name in ("driver_peak_mb", "largest_actor_peak_mb"):
        result[name] = [few[name], many[name]]
        result[f"{name}_growth"] = round(many[name] / few[name] - 1, 4)
    return result


def _pack(out: Path, count: int, arguments: argparse.Namespace) -> None:
    shards = out / "shards"
    if (shards / "index.parquet").exists():
        return
    # A pack that was interrupted is begun again.
    shutil.rmtree(shards, ignore_errors=True)
    print(f"packing {count:,} images into {shards}", file=sys.stderr, flush=True)
    _command(
        "shards", "pack", "shapes", str(shards), "--count", str(count), "--size", str(arguments.size),
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
            "method": {"name": "integrated_gradients", "options": {"steps": 10, "points": "uniform"}},
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


def _extract_observed(config: Path, out: Path, seconds_between: float) -> None:
    command = [sys.executable, "-m", "codec_dist", "extract", str(config)]
    with subprocess.Popen(command) as driver, (out / "observations.jsonl").open("a") as file:
        try:
            while True:
                try:
                    code = driver.wait(seconds_between)
                    break
                except subprocess.TimeoutExpired:
                    file.write(json.dumps(_observe(driver.pid, out / "run")) + "\n")
                    file.flush()
        except BaseException:
            driver.terminate()
            raise
    if code:
        raise subprocess.CalledProcessError(code, command)


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
        "driver_mb": _megabytes(driver, "smaps_rollup", "Pss"),
        "driver_peak_mb": _megabytes(driver, "status", "VmHWM"),
        "actors_mb": [_megabytes(pid, "smaps_rollup", "Pss") for pid in sorted(actors)],
        "actors_peak_mb": [_megabytes(pid, "status", "VmHWM") for pid in sorted(actors)],
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


def _megabytes(pid: int, file: str, name: str) -> float | None:
    """A line of /proc/PID/FILE. Pages that processes share are divided among them in ``Pss``, not in ``VmHWM``."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith(f"{name}:")), None)


# --- evaluation ------------------------------------------------------------------------------------------------------


def _evaluate(out: Path, shards: int, per_shard: int) -> dict[str, Any]:
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
        "seconds": round(seconds, 1),
        "images_per_second": round(done * per_shard / seconds, 1) if done else None,
        "coordinator_ms_per_shard": round(1000 * cpu / done, 2) if done else None,
        "driver_peak_mb": max((each["driver_peak_mb"] or 0 for each in observations), default=None),
        "largest_actor_peak_mb": max((_largest(each["actors_peak_mb"]) for each in observations), default=None),
        "driver_mb": _course([each["driver_mb"] for each in longest]),
        "largest_actor_mb": _course([_largest(each["actors_mb"]) for each in longest]),
    }


def _largest(values: list[float | None]) -> float:
    return max(filter(None, values), default=0)


def _course(values: list[float]) -> dict[str, Any] | None:
    """The median of each tenth of the observations, and the growth from the second to the last."""
    tenth = len(values) // 10
    if not tenth:
        return None
    tenths = [round(statistics.median(values[number * tenth :][:tenth]), 1) for number in range(10)]
    return {"tenths": tenths, "growth": round(tenths[-1] / tenths[1] - 1, 4)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the shards and the run")
    parser.add_argument("--count", type=int, default=IMAGENET, help="images [%(default)s]")
    parser.add_argument("--memory", action="store_true", help=f"compare {FEW:,} images with {MANY:,}")
    parser.add_argument("--size", type=int, default=8, help="height and width of the images [%(default)s]")
    parser.add_argument("--samples-per-shard", type=int, default=PER_SHARD, help="[%(default)s]")
    parser.add_argument("--actors", type=int, default=os.cpu_count(), help="[one per CPU: %(default)s]")
    parser.add_argument("--seconds-between", type=float, default=5.0, help="observations [%(default)s]")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
