"""A trained model with everything between images and the probabilities of their classes, in batches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mbib_timm.data.class_values import label_names
from mbib_timm.data.images import convert_image, pil_mode, why_unreadable
from mbib_timm.environment import usable_cores
from mbib_timm.errors import MbibError, unknown_name
from mbib_timm.evaluation.priors import EstimatedPrior, estimate_prior, log_shift, trained_shares, wanted_shares
from mbib_timm.inference.inputs import FoundImage
from mbib_timm.inference.prediction_files import Broken, Prediction
from mbib_timm.models.head_outputs import (
    PREDICTION,
    cache_sized,
    expert_heads,
    head_logits,
    logits_and_features,
    reported_heads,
)
from mbib_timm.models.weights import LoadedModel

USUAL_WORKERS = 8


class Photos(Dataset):
    """Images for a model, or what is wrong with them.

    Args:
        images: what `find_images` found.
        mode: PIL mode that every image is converted to.
        transform: from a PIL image to (C, H, W), uint8.
    """

    def __init__(self, images: Sequence[FoundImage], mode: str, transform: Callable[..., Tensor]) -> None:
        self.images, self.mode, self.transform = images, mode, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> Tensor | str:
        image = self.images[place]
        try:
            return self.transform(convert_image(image.reader.read(image.index), self.mode))
        except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, EOFError and more
            return why_unreadable(error)


def collate(items: Sequence[Tensor | str]) -> tuple[Tensor | None, list[str | None]]:
    """Return a batch of the images that can be read, (B, C, H, W), and for every image None or what is wrong with it.

    One tensor goes from a worker to the main process, and not one per image.
    """
    images = [item for item in items if isinstance(item, Tensor)]
    return torch.stack(images) if images else None, [item if isinstance(item, str) else None for item in items]


@dataclass(frozen=True)
class ScoredBatch:
    """Some images in order, and what the model gives for them.

    Attributes:
        images: of the batch.
        reasons: for each, why it cannot be read; None for one that can.
        logits: of those that can, without a prior, (B, K), float32, on the device.
        features: of those that can, (B, C), float32, on the device; None where they are not asked for.
    """

    images: Sequence[FoundImage]
    reasons: list[str | None]
    logits: Tensor
    features: Tensor | None

    def readable(self) -> list[FoundImage]:
        """Return the images that can be read."""
        return [image for image, reason in zip(self.images, self.reasons, strict=True) if reason is None]


class Predictor:
    """A trained model with everything between an image and its classes.

    Args:
        model: a trained model.
        head: ``prediction``, or the name of one of the model's heads or experts.
        prior: class frequencies that the probabilities are for: ``train``, ``uniform``, or a file, see `read_prior`;
            None leaves the logits as they are.
        device: where it runs.

    Attributes:
        names: of the classes, each its own, in label order.

    Raises:
        MbibError: a head that the model has not, or a prior where the model's own is not known.
    """

    def __init__(
        self, model: LoadedModel, head: str = PREDICTION, prior: str | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.model, self.head, self.device = model, head, torch.device(device)
        if head not in (PREDICTION, *reported_heads(model.module)):
            raise unknown_name(f"head of {model.source.name}", head, (PREDICTION, *reported_heads(model.module)))
        self.names = label_names(model.class_names, model.num_classes)
        self.shift: Tensor | None = None
        if prior is not None:
            trained = self.trained_shares()
            assert model.class_counts is not None  # or there would be no trained shares
            self.set_prior(wanted_shares(prior, model.class_counts, model.class_names), trained)
        self.module: nn.Module = model.module.to(self.device)

    def trained_shares(self) -> np.ndarray:
        """Return the class frequencies that the logits are for. Raises MbibError where the model does not say."""
        if self.head != PREDICTION and expert_heads(self.model.module):
            raise MbibError(
                f"{self.model.source.name}: the logits of each expert are for class frequencies of its own, which the "
                f"model does not say; omit --prior, or --head {self.head}"
            )
        return trained_shares(self.model.source.name, self.model.prior, self.model.class_counts)

    def set_prior(self, wanted: np.ndarray, trained: np.ndarray) -> None:
        """Let probabilities be for other class frequencies, (K,), than those that the logits are for."""
        self.shift = torch.from_numpy(log_shift(wanted, trained)).to(self.device)

    def estimate_prior(self, batches: Iterable[ScoredBatch]) -> tuple[list[ScoredBatch], EstimatedPrior | None]:
        """Let probabilities be for the class frequencies that make images most likely; return what was scored of them.

        Args:
            batches: of `score`.

        Returns:
            The batches, and the frequencies; None where there are no batches.

        Raises:
            MbibError: the model does not say which frequencies its logits are for; nothing is scored then.
            DataError: no image can be read.
        """
        trained, scored = self.trained_shares(), [*batches]
        if not scored:
            return scored, None
        logits = torch.cat([batch.logits.cpu().double() for batch in scored])
        found = estimate_prior(logits.softmax(dim=-1).numpy(), trained)
        self.set_prior(found.shares, trained)
        return scored, found

    def transform(self) -> Callable[..., Tensor]:
        """Return the preprocessing, from a PIL image to bytes (C, H, W), which `normalize` takes on the device."""
        transform: Callable[..., Tensor] = create_transform(
            **dict(self.model.preprocessing), is_training=False, use_prefetcher=True
        )
        return transform

    def normalize(self, images: Tensor) -> Tensor:
        """Return images of bytes (B, C, H, W) as the model takes them."""
        channels = (self.model.preprocessing[name] for name in ("mean", "std"))
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in channels)
        return (images.float() / 255 - mean) / std

    def adjust(self, logits: Tensor) -> Tensor:
        """Return logits (B, K) for the prior that is asked for."""
        return logits if self.shift is None else logits + self.shift

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return the probabilities (B, K) of the classes, for preprocessed images (B, C, H, W)."""
        return torch.softmax(self.adjust(self._forward(images.to(self.device), False)[0]), dim=-1)

    def _forward(self, images: Tensor, with_features: bool) -> tuple[Tensor, Tensor | None]:
        if with_features:
            logits, features = logits_and_features(self.module, images)
            return logits[self.head].float(), torch.cat([part.flatten(1) for part in features.values()], dim=1).float()
        if self.head == PREDICTION:
            return torch.cat([self.module(batch) for batch in cache_sized(images)]).float(), None
        return torch.cat([head_logits(self.module, batch)[self.head] for batch in cache_sized(images)]).float(), None

    def batches(
        self, images: Sequence[FoundImage], batch_size: int = 64, workers: int | None = None
    ) -> Iterator[tuple[Sequence[FoundImage], Tensor | None, list[str | None]]]:
        """Give the images, batch by batch: those of a batch, the readable ones as bytes, and what is wrong with each.

        Args:
            images: what to read.
            batch_size: images at once.
            workers: processes that decode; by default as many as there are CPUs, 8 at most; none for one batch or CPU.
        """
        photos = Photos(images, pil_mode(self.model.preprocessing["input_size"][0]), self.transform())
        batch_size = max(1, min(batch_size, len(images)))
        if workers is None:
            workers = 0 if len(images) <= batch_size or usable_cores() == 1 else min(USUAL_WORKERS, usable_cores())
        workers = min(workers, -(-len(images) // batch_size))
        loader = DataLoader(
            photos, batch_size, num_workers=workers, collate_fn=collate, pin_memory=self.device.type == "cuda"
        )
        for number, (readable, reasons) in enumerate(loader):
            start = number * batch_size
            yield images[start : start + batch_size], readable, reasons

    @torch.inference_mode()
    def score(
        self,
        images: Sequence[FoundImage],
        batch_size: int = 64,
        workers: int | None = None,
        with_features: bool = False,
    ) -> Iterator[ScoredBatch]:
        """Give what the model says of images, in order; arguments as those of `batches`.

        Raises:
            MbibError: a logit that is infinite or not a number.
        """
        for batch, readable, reasons in self.batches(images, batch_size, workers):
            logits, features = torch.zeros(0, len(self.names)), torch.zeros(0, 0) if with_features else None
            if readable is not None:
                # Convolutions are faster on channels that lie side by side.
                on_device = self.normalize(readable.to(self.device, non_blocking=True)).contiguous(
                    memory_format=torch.channels_last
                )
                logits, features = self._forward(on_device, with_features)
                if not torch.isfinite(logits).all():  # waits for the device, as whoever takes the batch does
                    raise MbibError(
                        f"{self.model.source.name}: logits of {batch[0].path} or an image after it are not finite"
                    )
            yield ScoredBatch(batch, reasons, logits, features)

    def items(
        self, batch: ScoredBatch, top_k: int = 5, threshold: float = 0.0, all_probabilities: bool = False
    ) -> list[Prediction | Broken]:
        """Return the predictions of a batch, in order.

        Args:
            batch: of `score`.
            top_k: classes of each.
            threshold: probability of the first class below which the answer is unsure.
            all_probabilities: give those of all classes as well.
        """
        logits = self.adjust(batch.logits.to(self.device))
        probabilities = torch.softmax(logits, dim=-1)
        # By the logits, as an evaluation ranks them: probabilities of several classes may be 0, or alike.
        best = logits.topk(min(top_k, len(self.names))).indices
        rows = iter(zip(best.tolist(), probabilities.gather(-1, best).tolist(), strict=True))
        every = iter(probabilities.cpu().numpy()) if all_probabilities else None
        items: list[Prediction | Broken] = []
        for image, reason in zip(batch.images, batch.reasons, strict=True):
            if reason is not None:
                items.append(Broken(image.path, reason, image.label))
                continue
            labels, values = next(rows)
            classes = list(zip(labels, values, strict=True))
            given = None if every is None else next(every)
            items.append(Prediction(image.path, classes, image.label, given, values[0] < threshold))
        return items
