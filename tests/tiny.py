"""The smallest networks that a method trains: a convolution with BatchNorm, and a classifier for each head."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn

from mbib_timm.data.batch import Batch
from mbib_timm.models.heads import CosineClassifier
from mbib_timm.models.preprocessing import settle
from mbib_timm.models.pretraining import Origin
from mbib_timm.recipe import Recipe
from mbib_timm.training.run_folder import RunFolder

OBSERVATIONS = ("v1", "v2", "v3", "z")
EXPERTS = ("expert1", "expert2", "expert3")
MBIB_EXPERTS = tuple(f"{expert}_{head}" for expert in EXPERTS for head in OBSERVATIONS)


class Cosine(CosineClassifier):
    """s <f / |f|, W_j / |W_j|>, written out."""

    def forward(self, x):
        return self.scale * F.linear(x / x.norm(dim=1, keepdim=True), self.weight / self.weight.norm(dim=1)[:, None])


class Tiny(nn.Module):
    """Gives a tensor, or in training a tuple of the logits of several heads, as all models here do."""

    def __init__(self, num_classes=5, heads=("logits",), classifier="linear", classifier_scale=1.0, width=8):
        super().__init__()
        self.head_names, self.prediction_heads = heads, heads[-2:]
        self.bottleneck_head = "z" if "z" in heads else None
        experts = dict.fromkeys(name.partition("_")[0] for name in heads if name.startswith("expert"))
        self.expert_heads = {e: tuple(name for name in heads if name.partition("_")[0] == e) for e in experts}
        if experts:
            self.prediction_heads = tuple(name for e in experts for name in self.expert_heads[e][-2:])
        self.head_hidden_size = width
        self.conv, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.mixed = nn.ModuleDict({name: nn.Linear(width, width) for name in heads})
        self.classifiers = nn.ModuleDict()
        for name in heads:
            linear = classifier == "linear"
            kind = nn.Linear(width, num_classes) if linear else Cosine(width, num_classes, classifier_scale)
            self.classifiers[name] = kind

    def get_classifier(self):
        classifiers = tuple(self.classifiers.values())
        return classifiers if len(classifiers) > 1 else classifiers[0]

    def forward_features(self, x):
        return F.relu(self.norm(self.conv(x)))

    def forward_head(self, x, pre_logits=False):
        """Of a network of one head."""
        ((name, mix),) = self.mixed.items()
        pooled = mix(x.mean(dim=(2, 3)))
        return pooled if pre_logits else self.classifiers[name](pooled)

    def features(self, x):
        """What the classifiers see, by head, (B, D) each."""
        pooled = self.forward_features(x).mean(dim=(2, 3))
        return {name: mix(pooled) for name, mix in self.mixed.items()}

    def forward_heads(self, x):
        features = self.features(x)
        return tuple(self.classifiers[name](features[name]) for name in self.head_names)

    def forward(self, x):
        features = self.features(x)
        if self.training and len(self.head_names) > 1:
            return tuple(self.classifiers[name](features[name]) for name in self.head_names)
        return torch.stack([self.classifiers[name](features[name]) for name in self.prediction_heads]).mean(dim=0)


def batches(sizes=(8, 8, 5), classes=5, seed=1, device="cpu", size=6, views=1, streams=1):
    """Batches as an epoch has them: for each step one of every stream, each with its views."""
    generator = torch.Generator().manual_seed(seed)

    def batch(n):
        images = tuple(torch.randn(n, 3, size, size, generator=generator).to(device) for _ in range(views))
        targets = torch.randint(classes, (n,), generator=generator)
        return Batch(images, targets.to(device), torch.arange(n).to(device))

    return [tuple(batch(n) for _ in range(streams)) for n in sizes]


_FOLDER = tempfile.TemporaryDirectory(prefix="mbib_previous.")  # removed at the end of the process


@functools.cache
def previous_run(classes, model="cifar_resnet20", size=(3, 16, 16), seed=0, names=None, **keys):
    """The folder of a stage before, with a model of random weights; what is else in a run's folder is not there."""
    folder = Path(tempfile.mkdtemp(dir=_FOLDER.name))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = timm.create_model(model, num_classes=classes, in_chans=size[0])
        for module in network.modules():  # as after some training: neither 0 and 1, nor alike
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    recipe = settle(Recipe(**keys), network)
    settings = dict(input_size=size, recipe=recipe, class_counts=np.arange(classes, 0, -1), class_names=names)
    RunFolder(folder).write_model(network, **settings, logit_prior="uniform", origin=Origin(), tag="made_up")
    return folder
