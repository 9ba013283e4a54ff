"""Where in an image a class was seen: Grad-CAM (Selvaraju et al. 2017) on a model's last map.

The maps' channels are weighed by the gradient of the class's logit, and their positive sum is laid over the image as
the model sees it. The gradients and sums are those of the library pytorch-grad-cam.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from mbib_timm.errors import MbibError, first_line
from mbib_timm.files import contains, make_folder, require_own
from mbib_timm.inference.inputs import FoundImage

# Overlays of smaller images are enlarged to this, in pixels of the shorter side.
SHOWN_SIZE = 224
TITLE = "mbib predict: Grad-CAM"  # in the file: another of its name is not replaced
POSSIBLE = "convolutional networks, networks of stages such as Swin, and vision transformers in timm can be shown"


class _FromMap(nn.Module):
    """A model cut at its last map, through which gradients go no further."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module, self.map = module, nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            last = self.module.forward_features(images)
        return self.module.forward_head(self.map(last.detach().requires_grad_()))


class GradCam:
    """Grad-CAM of a model's prediction: on its last map, of an MBIB model on its last tap.

    A vision transformer that reads its class token alone has no gradient on the other tokens there; of it, on what its
    last block attends to.

    Args:
        module: a model in evaluation mode, on its device, with timm's ``forward_features`` and ``forward_head``.
        input_size: of its images, (C, H, W).

    Raises:
        MbibError: pytorch-grad-cam is not installed, or the model has no map to show.
    """

    def __init__(self, module: nn.Module, input_size: Sequence[int]) -> None:
        try:
            from pytorch_grad_cam import GradCAM
        except ImportError as error:
            raise MbibError(f"Grad-CAM needs pytorch-grad-cam: pip install 'mbib-timm[cam]' ({error})") from None
        layer, to_maps = _find_layer(module, tuple(input_size))
        whole: nn.Module = _FromMap(module) if layer is None else module
        layer = whole.map if layer is None else layer  # type: ignore[assignment]
        self.cam = GradCAM(whole, [layer], reshape_transform=to_maps)
        try:
            self.heat(_nothing(module, input_size), [0])
        except (RuntimeError, ValueError, IndexError) as error:
            raise MbibError(
                f"Grad-CAM: {type(module).__name__} cannot be shown; {POSSIBLE} ({first_line(error)})"
            ) from None

    def heat(self, images: Tensor, labels: Sequence[int]) -> np.ndarray:
        """Return where the classes are seen.

        Args:
            images: as the model takes them, (B, C, H, W).
            labels: a class for each.

        Returns:
            (B, H, W), from 0 to 1 for the most of each image, float32.
        """
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        with torch.inference_mode(False), torch.enable_grad():
            found: np.ndarray = self.cam(images.clone(), [ClassifierOutputTarget(label) for label in labels])
        return found


def _find_layer(module: Any, input_size: tuple[int, ...]) -> tuple[nn.Module | None, Callable[[Tensor], Tensor]]:
    """Return the layer to look at, None for the last map itself, and what turns its output into maps (B, C, H, W)."""
    name = type(module).__name__
    if not (hasattr(module, "forward_features") and hasattr(module, "forward_head")):
        raise MbibError(f"Grad-CAM: {name} has no forward_features and forward_head; {POSSIBLE}")
    inner = module.backbone if isinstance(getattr(module, "backbone", None), nn.Module) else module
    with torch.no_grad():
        try:
            last = module.forward_features(_nothing(module, input_size))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise MbibError(f"Grad-CAM: {name} gives no map ({first_line(error)})") from None
    if isinstance(last, Tensor) and last.ndim == 4:
        width = getattr(module, "num_features", None)
        channels_last = last.shape[1] != width and last.shape[-1] == width
        height, breadth = last.shape[1:3] if channels_last else last.shape[2:]
        if height * breadth == 1:
            raise MbibError(
                f"Grad-CAM: the last map of {name} is a single point for images of {input_size[1]}x{input_size[2]}, "
                "and shows no locations"
            )
        return None, (lambda maps: maps.permute(0, 3, 1, 2)) if channels_last else (lambda maps: maps)
    if isinstance(last, Tensor) and last.ndim == 3:
        prefix = int(getattr(inner, "num_prefix_tokens", 0))
        grid = getattr(getattr(inner, "patch_embed", None), "grid_size", None)
        tokens = last.shape[1] - prefix
        height, breadth = grid or (round(tokens**0.5),) * 2
        if height * breadth == tokens:

            def to_maps(tokens: Tensor) -> Tensor:
                return tokens[:, prefix:].unflatten(1, (height, breadth)).permute(0, 3, 1, 2)

            reads_token = prefix > 0 and getattr(inner, "global_pool", "") == "token"
            if not reads_token:
                return None, to_maps
            block = inner.blocks[-1] if hasattr(inner, "blocks") else None
            if isinstance(getattr(block, "norm1", None), nn.Module):
                return block.norm1, to_maps  # type: ignore[union-attr]
    raise MbibError(f"Grad-CAM: {name} has no spatial map at its end; {POSSIBLE}")


def _nothing(module: nn.Module, input_size: Sequence[int]) -> Tensor:
    """Return a black image, (1, C, H, W)."""
    reference = next(module.parameters())
    return torch.zeros(1, *input_size, device=reference.device, dtype=reference.dtype)


def overlay(image: Tensor, heat: np.ndarray) -> Image.Image:
    """Return an image with the heat laid over it: blue where there is none, red where it is most.

    Args:
        image: (C, H, W), uint8, of one or three channels.
        heat: (H, W), from 0 to 1.
    """
    from pytorch_grad_cam.utils.image import show_cam_on_image

    height, width = heat.shape
    factor = max(1, -(-SHOWN_SIZE // min(height, width)))
    size = (width * factor, height * factor)
    pixels = image.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()
    shown = np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BICUBIC))
    warm = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    return Image.fromarray(show_cam_on_image(shown.astype(np.float32) / 255, warm.clip(0, 1), use_rgb=True))


class OverlayFolder:
    """A folder of overlays, each under the path of its image below what was given.

    Of images of one name the further ones have a number.

    Args:
        folder: where; made when the first is written.
        images: all that may have an overlay.

    Raises:
        MbibError: a file that would be replaced, and is no overlay.
    """

    def __init__(self, folder: Path, images: Sequence[FoundImage]) -> None:
        self.files: list[Path] = []
        taken: set[Path] = set()
        for image in images:
            parts = [part for part in Path(image.name).parts if part not in ("..", "/")]
            plain = folder.joinpath(*parts).with_suffix(".png")
            file, number = plain, 1
            while file in taken:
                number += 1
                file = plain.with_name(f"{plain.stem}-{number}.png")
            taken.add(file)
            self.files.append(file)
            require_own("--cam", file, contains(TITLE.encode()), "is not a picture of this command")

    def save(self, place: int, shown: Image.Image) -> None:
        """Write the overlay of the image at a place as PNG. Raises MbibError where it cannot be written."""
        file = self.files[place]
        make_folder(file.parent)
        title = PngInfo()
        title.add_text("Title", TITLE)
        try:
            shown.save(file, pnginfo=title)
        except OSError as error:
            raise MbibError(f"cannot write the overlay {file}: {error.strerror or first_line(error)}") from None
