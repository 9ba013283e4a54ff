#!/usr/bin/env python
"""`mbib train` as a script, for torchrun:

torchrun --nproc-per-node 2 tools/train.py mbib_resnet32.cifar100_lt_if100 --sync-bn
"""

import sys

from mbib_timm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
