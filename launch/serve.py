"""`moeplace serve` as a script for torchrun; every rank runs it.

    torchrun --standalone --nproc-per-node 4 launch/serve.py MODEL --placement P --requests in.jsonl --out out.jsonl

Without torchrun it is one rank.
"""

import sys

from moeplace.launch.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
