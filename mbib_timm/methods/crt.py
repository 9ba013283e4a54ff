"""cRT: the classifier of a trained network is trained again, from the start, on balanced classes.

Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR 2020.
"""

from mbib_timm.methods.base import register
from mbib_timm.methods.ce import CrossEntropy


@register("crt")
class ClassifierRetraining(CrossEntropy):
    """Cross-entropy on classes drawn alike; the network below the classifier keeps its weights.

    Its BatchNorm layers stay in training mode, as in the authors' code: their running statistics become those of the
    balanced batches.
    """

    title = "cRT"
    citation = "Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR 2020"
    logit_prior = "uniform"
    needs_start = True
    sampler = "balanced"
    part = "classifier"
    reset = "classifier"
    frozen_bn = "train"
