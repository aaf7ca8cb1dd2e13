"""The resolutions of a slide that are believed."""

import math

# um/px at level 0 that a file is believed: scanners have 0.12 (80x) to 2 (5x), and converters wrote values 10 times too
# small (0.05 for 0.5, 0.1 for 1) and too large (2.5 for 0.25, 5 for 0.5).
PLAUSIBLE_MPP = (0.11, 2.1)
SAME_MPP = 0.05  # mpp-x and mpp-y may differ by: square tiles are squares of tissue
MPP_HINT = "HINT: give the true value in the manifest's `mpp` column, or with --slide_mpp."
CM_IN_UM, INCH_IN_UM = 10_000.0, 25_400.0
OVERRIDE, FALLBACK = "the override", "--slide_mpp"


def mpp_problem(x: float, y: float, source: str, bounds: tuple[float, float]) -> str:
    """What is wrong with a resolution, or an empty string."""
    low, high = bounds
    if abs(x - y) > SAME_MPP * abs(min(x, y)):
        return f"pixels must be square, within {SAME_MPP:.0%}, got {x:g} x {y:g} um from {source}"
    value = (x + y) / 2
    if low <= value <= high:
        return ""
    words = f"mpp must be in [{low}, {high}] um/px to be plausible, got {value:g} from {source}"
    near = next((value * factor for factor in (10, 0.1) if 0.2 <= value * factor <= 1.05), None)
    return f"{words}; is {near:g} meant?" if near and bounds == PLAUSIBLE_MPP else words


def positive_number(text: str | None) -> float | None:
    """The number that a property holds, or None."""
    try:
        value = float(text) if text else 0.0
    except ValueError:
        return None
    return value if value > 0 and math.isfinite(value) else None
