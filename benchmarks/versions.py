"""Time the same work in several checkouts, or by another library, by turns in one run.

A script names its works, functions from settings to a function without arguments. `race` starts the
script again for every contestant, with the package of that contestant's checkout, and asks one
process after the other for a turn. Other programs on the machine then slow all of them alike.
Seconds of the processor count all threads; with `OMP_NUM_THREADS=1` they are the wall time of an
idle core.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
THIS, OTHER = "this version", "other version"


def parse(description, add):
    """The arguments that every race takes, and those that `add` adds; prints the command."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    add(parser.add_argument)
    parser.add_argument("--against", type=Path, help="another checkout, such as an older version")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"```bash\npython {' '.join(sys.argv)}\n```\n")
    return args


def race(args, settings, peers=()):
    """Turns of this version, of the other one and of peers; the first turn of each warms it up.

    A turn has seconds of processor (`cpu`) and clock (`wall`), peak memory in GiB, and the result.
    """
    checkouts = {THIS: ROOT} | ({OTHER: args.against.resolve()} if args.against else {})
    checkouts |= dict.fromkeys(peers, ROOT)
    workers, pipes = {}, {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    for name, checkout in checkouts.items():
        command = [sys.executable, sys.argv[0], "--work", json.dumps([name, settings])]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
        workers[name] = subprocess.Popen(command, env=environment, text=True, **pipes)
    turns = {name: [] for name in workers}
    for _ in range(args.repeats + 1):
        for name, worker in workers.items():
            print("go", file=worker.stdin, flush=True)
            turns[name].append(json.loads(worker.stdout.readline() or sys.exit(f"{name} failed")))
    for worker in workers.values():
        worker.communicate()
    return {name: them[1:] for name, them in turns.items()}


def serve(works):
    """Do the work that `race` asks for; returns at once in the process that was not started by it.

    The works of both versions are one function, under `THIS`.
    """
    if "--work" not in sys.argv:
        return
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    name, settings = json.loads(sys.argv[-1])
    work = works[THIS if name == OTHER else name](**settings)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        result = work()
        turn = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({**turn, "peak": peak, "result": result}), file=answers, flush=True)
    sys.exit()


def median(turns, clock="cpu"):
    """Median seconds of the turns."""
    return statistics.median(turn[clock] for turn in turns)
