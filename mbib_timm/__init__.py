"""Long-tailed image classification with timm.

`import mbib_timm` registers the MBIB and BIB models (and the plain backbones that timm lacks) with timm:

    import timm, mbib_timm
    model = timm.create_model('mbib_resnet32', num_classes=100)
"""

__version__ = "0.1.0"

from mbib_timm import models

__all__ = ["__version__", "models"]
