"""On a CUDA device: extraction with a whole ViT-Huge, and all pairs of 50,000 x 1280 embeddings.

    python benchmarks/gpu.py --repeats 5 --against ../older

Runs `extraction.py` and `pairwise.py` there; further arguments are handed on to both.
"""

import subprocess
import sys
from pathlib import Path

WORKS = [
    "extraction.py vit-huge --device cuda --dtype bfloat16 --depth 32 --images 2048 "
    "--batch-size 64",
    "pairwise.py --device cuda --sizes 50000 --widths 1280 --halves 200",
]


def main():
    """Run both and print their tables."""
    for work in WORKS:
        script, *arguments = work.split()
        command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
        subprocess.run([*command, *sys.argv[1:]], check=True)
        print()


if __name__ == "__main__":
    main()
