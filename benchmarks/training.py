"""Time of one update of the recipe `matched`, and with PyTorch's own Muon.

    python benchmarks/training.py --repeats 5

Four kinds of updates take turns in one process, on random images: further views cut to 20 patches,
further views whole, the same with one further view instead of two, and the first kind again with
`torch.optim.Muon`, which multiplies in bfloat16 on every processor. The table shows medians of CPU
seconds over all threads, which other programs hardly change; with one thread (`OMP_NUM_THREADS=1`)
images/s are those of one idle core.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ijepa.devices import choose_dtype
from ijepa.training import TrainConfig, decay_start, init_state, train_step

CPU = torch.device("cpu")
STEPS_PER_EPOCH = 187


def make_update(config, dtype, images, step, peer=False):
    """A function that does the update of a run at `step`."""
    state = init_state(config, CPU, dtype)
    if peer:
        group, like = state.muon.param_groups[0], {"adjust_lr_fn": "match_rms_adamw"}
        state.muon = torch.optim.Muon(group["params"], weight_decay=group["weight_decay"], **like)

    def update():
        state.step = step
        train_step(state, config, images, STEPS_PER_EPOCH)

    return update


def main():
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    args = parser.parse_args()
    config = TrainConfig()
    dtype = choose_dtype(args.dtype, CPU)
    size = (config.batch_size, 3, config.vit.image_size, config.vit.image_size)
    images = torch.randint(0, 256, size, dtype=torch.uint8)
    whole, two = decay_start(config, STEPS_PER_EPOCH), dataclasses.replace(config, num_views=2)
    works = {
        "views of 20 patches": make_update(config, dtype, images, whole - 1),
        "whole views": make_update(config, dtype, images, whole),
        "whole views, two for three": make_update(two, dtype, images, whole),
        "views of 20 patches, torch.optim.Muon": make_update(
            config, dtype, images, whole - 1, True
        ),
    }
    operations = {}
    for name, work in works.items():  # this also warms up
        with FlopCounterMode(display=False) as counter:
            work()
        operations[name] = counter.get_total_flops()
    seconds = {name: [] for name in works}
    for _ in range(args.repeats):
        for name, work in works.items():
            began = time.process_time()
            work()
            seconds[name].append(time.process_time() - began)
    print(f"{dtype}, {torch.get_num_threads()} threads, {args.repeats} updates each\n")
    print(f"| update of {config.batch_size} images | GFLOP | CPU s | images/s | x the first |")
    print("| --- | --- | --- | --- | --- |")
    base = next(iter(seconds.values()))
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, base, strict=True))
        median = statistics.median(times)
        cells = f"{operations[name] / 1e9:.0f} | {median:.3f} | {config.batch_size / median:.0f}"
        print(f"| {name} | {cells} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
