"""cRT: the classifier of a trained network is initialised anew and trained on balanced classes.

Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR 2020.
"""

from mbib_timm.methods.base import register
from mbib_timm.methods.ce import CrossEntropy


@register("crt")
class ClassifierRetraining(CrossEntropy):
    """Cross-entropy with class-balanced sampling; only the classifier of a trained model trains.

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
