"""A plugin that brings faults into a run as users start it: what the environment variable MBIB_TEST_FAULT says.

``1 nan 7`` makes the loss of process 1 not a number in its seventh step; for all else see `faults`.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import faults

from mbib_timm.methods import METHODS, register

FAULT = os.environ.get("MBIB_TEST_FAULT", "")
if "nan" not in FAULT:
    faults.put_in(FAULT)


@register("faulty_ce")
class FaultyCrossEntropy(METHODS["ce"]):
    """Cross-entropy, but for one step of one process."""

    steps = 0

    def head_loss(self, logits, targets):
        rank, kind, number = FAULT.split() if FAULT else ("-1", "", "0")
        self.steps += 1
        bad = kind == "nan" and rank == os.environ.get("RANK", "0") and self.steps == int(number)
        return super().head_loss(logits, targets) * (float("nan") if bad else 1)
