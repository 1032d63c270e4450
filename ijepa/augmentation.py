"""Random views of a batch of small images, with separate draws for each image.

Every function takes the generator that it draws from, so that a seed gives the same views.

Dimension key: B images of H x W pixels.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

# Luma and two color differences (NTSC): a hue is an angle in the plane of the two differences.
YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def random_resized_crop(
    images: UInt8[Tensor, "B 3 H W"], min_scale: float, generator: torch.Generator
) -> Float[Tensor, "B 3 H W"]:
    """Cut out a box, enlarge it bilinearly to the full size, flip half of the images; in [0, 1].

    A box has between `min_scale` and all of the area and an aspect (width / height) between 3/4 and
    4/3, log-uniform, and lies wholly inside the image (Szegedy et al. 2015,
    https://arxiv.org/abs/1409.4842, section 6).
    """
    draws = torch.rand(5, len(images), generator=generator, device=images.device)
    area = min_scale + (1 - min_scale) * draws[0]
    aspect = (math.log(4 / 3) * (2 * draws[1] - 1)).exp()
    # Shares of the image's sides, and the center in coordinates from -1 to 1.
    width = (area * aspect).sqrt().clamp(max=1)
    height = (area / aspect).sqrt().clamp(max=1)
    transform = torch.zeros(len(images), 2, 3, device=images.device)
    transform[:, 0, 0] = torch.where(draws[4] < 0.5, -width, width)
    transform[:, 1, 1] = height
    transform[:, 0, 2] = (1 - width) * (2 * draws[2] - 1)
    transform[:, 1, 2] = (1 - height) * (2 * draws[3] - 1)
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    pixels = images.float() / 255
    # Rounding may put a sample beyond the outermost pixel center; it takes that pixel.
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def color_jitter(
    images: Float[Tensor, "B 3 H W"], strength: float, grey_share: float, generator: torch.Generator
) -> Float[Tensor, "B 3 H W"]:
    """Change brightness, contrast, saturation and hue, in this order; make some images gray.

    Images and results lie in [0, 1]. Factors are drawn from 1 +- `strength`. The hue turns by at
    most strength / 4 of the circle. An image turns gray with probability `grey_share`. The
    proportions are SimCLR's (Chen et al. 2020, https://arxiv.org/abs/2002.05709, appendix A).
    """
    draws = torch.rand(5, len(images), 1, 1, 1, generator=generator, device=images.device)
    brightness, contrast, saturation = 1 + strength * (2 * draws[:3] - 1)
    images = images * brightness
    images = torch.lerp(images.mean(dim=(1, 2, 3), keepdim=True), images, contrast)
    images = torch.lerp(images.mean(dim=1, keepdim=True), images, saturation)
    images = rotate_hue(images, 0.25 * strength * (2 * draws[3].flatten() - 1)).clamp(0, 1)
    return torch.where(draws[4] < grey_share, images.mean(dim=1, keepdim=True), images)


def rotate_hue(
    images: Float[Tensor, "B 3 H W"], turns: Float[Tensor, " B"]
) -> Float[Tensor, "B 3 H W"]:
    """Turn the hues by shares of the full circle; grays and luma stay as they are."""
    to_yiq, to_rgb = yiq_matrices(images.device)
    angle = 2 * math.pi * turns
    rotation = torch.zeros(len(images), 3, 3, device=images.device)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 2, 1] = angle.sin()
    rotation[:, 1, 2] = -angle.sin()
    return torch.einsum("bij,bjhw->bihw", to_rgb @ rotation @ to_yiq, images)


@cache
def yiq_matrices(device: torch.device) -> tuple[Float[Tensor, "3 3"], Float[Tensor, "3 3"]]:
    """From RGB to luma and differences, and back; cached, as each copy to a GPU waits for it."""
    to_yiq = torch.tensor(YIQ)
    return to_yiq.to(device), torch.linalg.inv(to_yiq).to(device)


def standardize(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """Map [0, 1] to [-1, 1]: mean and deviation 0.5, a choice that fits any data set."""
    return (images - 0.5) / 0.5
