"""What a demo slide shows: tissue with holes, nuclei that are solid or rings, fields of other density, pen marks."""

import math

import numpy as np
from PIL import Image, ImageDraw

FOCUS_RADIUS_PX = 88  # at BASE_MPP: about six 64 px tiles
SOLID_RADII_PX = (3.2, 4.0, 4.8)
EOSIN = np.array([222, 150, 190], dtype=np.float32)
HAEMATOXYLIN = np.array([96, 62, 140], dtype=np.float32)
GLASS = np.array([243, 242, 245], dtype=np.float32)
RING_RATIO = 1.9  # outer radius of a ring over the solid nucleus's


def draw_slide(
    *,
    tumor: bool,
    side_px: int,
    rng: np.random.Generator,
    foci: int,
    contrast: float,
    rings: float,
) -> np.ndarray:
    """Return one slide at 0.5 um/px, without pen marks: uint8 [side, side, 3].

    Args:
        tumor: whether the slide is of this class.
        side_px: side of the square slide.
        rng: draws everything.
        foci: how many a tumour has.
        contrast: how far the nuclei stand out.
        rings: share of the foci's nuclei that are rings, in [0, 1].
    """
    tissue = _tissue(side_px, rng)
    places = _focus_centres(tissue, rng, count=2 + foci)
    crowded, pale = _disc_field(side_px, places[:1]), _disc_field(side_px, places[1:2])
    lesion = _disc_field(side_px, places[2:]) if tumor else np.zeros_like(tissue)
    density = (0.0055 + 0.006 * crowded - 0.003 * pale) * (tissue > 0.5)  # nuclei per px
    share = rings * (lesion >= 0.5)
    solid = _nuclei(density * (1 - share), _solid_kernels(), rng)
    pale_centred = _nuclei(density * share, _ring_kernels(), rng)
    return _stain(tissue, contrast * np.clip(solid + pale_centred, 0, 1), pale, rng)


def _smooth_noise(side_px: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    grid = rng.normal(size=(cells, cells)).astype(np.float32)
    picture = Image.fromarray(grid).resize((side_px, side_px), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def _tissue(side_px: int, rng: np.random.Generator) -> np.ndarray:
    """An irregular blob with holes: float32 [side, side], 1 inside, soft at the edge."""
    y, x = np.mgrid[0:side_px, 0:side_px].astype(np.float32) / side_px - 0.5
    angle, squeeze = rng.uniform(0, math.pi), rng.uniform(0.8, 1.0)
    u, v = x * math.cos(angle) + y * math.sin(angle), (y * math.cos(angle) - x * math.sin(angle)) / squeeze
    outline = 0.40 - np.hypot(u, v) + 0.05 * _smooth_noise(side_px, 6, rng)
    holes = 1.5 - _smooth_noise(side_px, max(6, side_px // 96), rng)
    return np.clip(np.minimum(outline * side_px / 4, holes * 8), 0, 1)


def _focus_centres(tissue: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """Centres [count, 2] (y, x) inside the tissue, as far from each other as a few tries find."""
    inside = np.argwhere(tissue > 0.99)
    tries = inside[rng.integers(0, len(inside), size=(64, count))]
    gaps = np.linalg.norm(tries[:, :, None] - tries[:, None, :], axis=-1) + np.eye(count) * tissue.shape[0]
    return tries[gaps.min(axis=(1, 2)).argmax()]


def _disc_field(side_px: int, centres: np.ndarray) -> np.ndarray:
    y, x = np.mgrid[0:side_px, 0:side_px]
    field = np.zeros((side_px, side_px), dtype=np.float32)
    for cy, cx in centres:
        field = np.maximum(field, np.hypot(y - cy, x - cx) < FOCUS_RADIUS_PX)
    return field


def _kernel(outer_px: float, inner_px: float) -> np.ndarray:
    reach = math.ceil(outer_px) + 1
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    r = np.hypot(x, y)
    return np.clip(outer_px - r + 0.5, 0, 1) - np.clip(inner_px - r + 0.5, 0, 1)


def _solid_kernels() -> list[np.ndarray]:
    return [_kernel(r, -1.0) for r in SOLID_RADII_PX]


def _ring_kernels() -> list[np.ndarray]:
    # outer^2 - inner^2 = r^2: a ring of the same ink as the solid nucleus of radius r.
    return [_kernel(RING_RATIO * r, r * math.sqrt(RING_RATIO**2 - 1)) for r in SOLID_RADII_PX]


def _nuclei(density: np.ndarray, kernels: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Stamp kernels at Poisson points of the given density per pixel; overlapping ink adds up."""
    side = density.shape[0]
    ink = np.zeros((side + 32, side + 32), dtype=np.float32)
    for kernel in kernels:
        reach = kernel.shape[0] // 2
        for cy, cx in np.argwhere(rng.random(density.shape) < density / len(kernels)):
            top, left = cy + 16 - reach, cx + 16 - reach
            ink[top : top + kernel.shape[0], left : left + kernel.shape[1]] += kernel
    return ink[16:-16, 16:-16]


def _stain(tissue: np.ndarray, nuclei: np.ndarray, pale: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    eosin = EOSIN + rng.normal(0, 4, 3)
    haematoxylin = HAEMATOXYLIN + rng.normal(0, 4, 3)
    side = tissue.shape[0]
    fibres = (0.10 * _smooth_noise(side, side // 10, rng) + 0.08 * _smooth_noise(side, 8, rng) - 0.25 * pale)[..., None]
    ground = eosin + np.clip(fibres, -0.4, 0.4) * (eosin - GLASS)
    inked = ground + nuclei[..., None] * 0.85 * (haematoxylin - ground)
    image = GLASS + tissue[..., None] * (inked - GLASS) + rng.normal(0, 2.5, (side, side, 1))
    return np.clip(image, 0, 255).astype(np.uint8)


def pen_marks(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A slide, uint8 [H, W, 3], with a wavy line of a pen in a corner."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    side = image.shape[0]
    colour = [(30, 60, 160), (20, 120, 60), (15, 15, 20)][int(rng.integers(3))]
    corner = rng.uniform(0.03, 0.12, 2) * side
    points = [tuple(corner + np.array([t * side * 0.35, side * 0.03 * math.sin(9 * t)])) for t in np.linspace(0, 1, 24)]
    draw.line(points, fill=colour, width=max(6, side // 90))
    return np.asarray(picture)
