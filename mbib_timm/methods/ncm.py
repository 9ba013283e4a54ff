"""The nearest class mean: a cosine classifier whose rows are the directions of the class means."""

from collections.abc import Callable

from torch import nn

from mbib_timm.methods.base import Method, NoSettings, register


@register("ncm")
class NearestClassMean(Method):
    """Replaces a trained model's classifiers with cosine classifiers made of class means; trains nothing.

    Every class has a mean of the same length, whatever its number of images: Kang et al. (2020) use it on long tails,
    Mensink et al. (2013) for classes that come later.
    """

    title = "Nearest class mean"
    citation = "Mensink et al., Distance-Based Image Classification, TPAMI 2013; on long tails Kang et al., ICLR 2020"
    logit_prior = "uniform"
    reset = "classifier"
    classifier_start = "class_means"
    needs_start = True
    post_hoc = True

    @classmethod
    def build_network(cls, settings: NoSettings, build: Callable[..., nn.Module]) -> nn.Module:
        """Build the recipe's model with cosine classifiers."""
        return build(classifier="cosine")
