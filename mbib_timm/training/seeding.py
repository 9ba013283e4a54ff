"""Every random generator of an epoch is a function of (seed, epoch, rank, stage): so a run resumes bit-identically."""

import random

import numpy as np
import torch


def seed_generators(seed: int, epoch: int, rank: int, stage: int = 0) -> None:
    """Seed Python's, numpy's and torch's generators (all devices).

    The global generators belong to the running program here; data sets and subsets use generators of their own.

    Args:
        seed: the recipe's seed.
        epoch: the epoch that starts, 0 for the first; -1 for the initialisation of the model.
        rank: this process among the distributed ones.
        stage: the number of stages before this one.
    """
    state = np.random.SeedSequence([seed, epoch + 1, rank, *([stage] if stage else [])]).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))
    torch.manual_seed(int(state[2]))
