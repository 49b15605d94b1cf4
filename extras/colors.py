"""Colours as people see them: CIE L*a*b*, distances in it, and the eleven basic colour terms."""

import numpy as np

from data import CANONICAL_COLORS, COLORS

SAME_COLOR = 12.0  # delta E of two colours that count as one, also across a term's border

_RGB_TO_XYZ = np.array(
    [
        (0.4124564, 0.3575761, 0.1804375),
        (0.2126729, 0.7151522, 0.0721750),
        (0.0193339, 0.1191920, 0.9503041),
    ]
)


def lab(rgb) -> np.ndarray:
    """sRGB 0..255 (..., 3) -> CIE L*a*b* for D65 (..., 3), L* in 0..100 (IEC 61966-2-1; CIE 15)."""
    rgb = np.asarray(rgb, np.float64) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _RGB_TO_XYZ.T / _RGB_TO_XYZ.sum(1)  # relative to D65, which is what white is
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def delta_e(rgb1, rgb2) -> float:
    """CIE76: the Euclidean distance of two sRGB colours (0..255) in L*a*b*. Two is just visible."""
    return float(np.linalg.norm(lab(rgb1) - lab(rgb2)))


# Berlin and Kay's eleven basic terms. Prototypes: the CSS values of the ten canonical ones and grey
BASIC_COLORS = {name: COLORS[name] for name in CANONICAL_COLORS} | {"grey": (128, 128, 128)}
_BASIC_LAB = lab(list(BASIC_COLORS.values()))  # (11, 3)


def basic_color(rgb) -> str:
    """The basic colour term whose prototype is nearest in L*a*b*; rgb in 0..255."""
    distances = np.square(_BASIC_LAB - lab(rgb)).sum(1)
    return list(BASIC_COLORS)[int(distances.argmin())]


def same_color(rgb1, rgb2) -> bool:
    """Whether two colours (0..255) go by one basic term, or are hardly apart."""
    return basic_color(rgb1) == basic_color(rgb2) or delta_e(rgb1, rgb2) <= SAME_COLOR
