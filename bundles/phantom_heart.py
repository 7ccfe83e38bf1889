"""A synthetic heart in its chest: anatomy that differs between patients, how it beats, and what MR shows of it."""

from __future__ import annotations

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import gaussian_filter, map_coordinates

ANATOMY = {
    "field of view": (160, 185),
    "turn": (0, 0.8),
    "aside": (4, 14),
    "below": (-8, 2),
    "skin": (6, 14),
    "fat": (1.5, 4),
    "radius": (23, 27),
    "wall": (7.5, 10),
    "depth": (32, 40),
    "systole": (0.61, 0.69),
    "coil": (2.4, 3.9),
    "bias": (0.1, 0.3),
}
"""What differs between ACDC's patients, each drawn between two values: lengths in mm, angles in radians.

``aside`` and ``below`` place the left ventricle in the picture; ``turn`` moves the right one from its left to above it.
``radius`` and ``wall`` are the left ventricle's at end-diastole, ``depth`` the right one's; ``systole`` is what remains
of the radius at end-systole. ``fat`` lies around the heart. Signal grows towards the ``coil``, by ``bias`` in 100 mm.
"""

SIGNAL = {
    "skin": 260,
    "chest wall": 65,
    "ribs": 150,
    "lungs": 22,
    "lung vessels": 170,
    "diaphragm": 250,
    "liver": 80,
    "liver vessels": 120,
    "spine": 100,
    "aortic wall": 60,
    "aorta": 205,
    "epicardial fat": 235,
    "right wall": 70,
    "right ventricle": 180,
    "myocardium": 65,
    "left ventricle": 215,
    "papillary muscles": 80,
}
"""Signal of each structure in bright-blood cine MR: fat is brightest, then blood, then muscle and liver, then lung."""

BEAT = ((0, 1), (0.2, 0.93), (0.7, 0.17), (1, 0), (1.1, 0.07), (1.4, 0.7), (1.72, 0.8), (1.92, 0.97), (2, 1))
"""How full the left ventricle is, from 0 to 1, at moments of a beat: systole goes from 0 to 1, diastole from 1 to 2.

It empties fast and fills fast by itself, then rests, and at the end the atrium fills it up.
"""

LINING = {"left ventricle": 1.1, "right ventricle": 0.6}
"""mm of trabeculae in a beating heart's ventricles at end-diastole: dark in the picture, cavity in the labels.

Experts count them so. These widths, and ``RIM``, are those at which weights that learned from ACDC's experts find the
labels.
"""

RIM = 0.9
"""mm of dark line around a beating heart's muscle, where its signal and that of fat cancel. No label has it."""


class Heart:
    """A patient's heart.

    Args:
        size: pixels per side of a slice.
        slices: of a volume, base to apex.
        rng: draws the anatomy.

    Attributes:
        body: values drawn from ``ANATOMY``.
        pixel: size of a pixel in mm.
        gap: mm from slice to slice.
    """

    def __init__(self, size: int, slices: int, rng: np.random.Generator) -> None:
        self.body = body = {name: rng.uniform(*limits) for name, limits in ANATOMY.items()}
        self.pixel, self.gap = body["field of view"] / size, float(rng.choice([8.0, 10.0]))

        def speckle(width: float) -> np.ndarray:
            """Smooth noise of mean 0 and deviation 1; its spots are some ``width`` mm wide."""
            sigma = width / self.pixel
            noise = gaussian_filter(rng.normal(size=(size, size, slices)), (sigma, sigma, 0.4))
            return noise / noise.std()

        axis = (np.arange(size) - size / 2 + 0.5) * self.pixel
        x, y, self._z = np.meshgrid(axis, axis, (np.arange(slices) + 0.5) / slices, indexing="ij")
        cos, sin = np.cos(body["turn"]), np.sin(body["turn"])
        x, y = cos * x + sin * y - body["aside"], cos * y - sin * x - body["below"]
        self._x, self._y = x + 1.5 * speckle(14), y + 1.5 * speckle(14)  # nobody is made of ellipses
        self._chest = _chest(self._x, self._y, self._z, body, speckle(2.2))
        self._coil = np.exp(body["bias"] * (np.cos(body["coil"]) * self._x + np.sin(body["coil"]) * self._y) / 100)
        self._texture = 1 + 0.06 * speckle(3)  # of tissue, and of flowing blood

    def contractions(self, frames: int, es: int) -> np.ndarray:
        """What remains of the left ventricle's radius in each frame of a beat: all in frame 0, least in ``es``."""
        times = np.interp(np.arange(frames), (0, es, frames), (0, 1, 2))
        full = PchipInterpolator(*zip(*BEAT, strict=True))(times)
        return np.sqrt(self.body["systole"] ** 2 * (1 - full) + full)

    def frame(
        self, contraction: float, rng: np.random.Generator, beating: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """One frame.

        Args:
            contraction: what remains of the left ventricle's radius.
            rng: draws the noise.
            beating: whether the texture follows the motion, and ``LINING`` and ``RIM`` are there. The phases of hearts
                that do not beat are older, and stay as they are.

        Returns:
            Image and labels, ``X, Y, Z``: 1 right ventricle, 2 myocardium, 3 left ventricle.
        """
        heart = _heart(self._x, self._y, self._z, self.body, contraction)
        labels = np.zeros(self._x.shape, np.uint8)
        for label, name in enumerate(("right ventricle", "myocardium", "left ventricle"), 1):
            labels[heart[name] > 0] = label
        texture = self._texture
        if beating:
            texture = np.where(heart["epicardial fat"] > 0, self._moved_texture(contraction), texture)
            heart["myocardium"] = heart["myocardium"] + RIM
            for name, width in LINING.items():
                heart[name] = heart[name] - width / contraction  # the same muscle lines a smaller cavity
        image = np.zeros(self._x.shape)
        for name, depth in (self._chest | heart).items():
            image += (SIGNAL[name] - image) * np.clip(depth / 2 + 0.5, 0, 1)  # a border of 2 mm belongs to both sides
        image = gaussian_filter(image * (self._coil * texture), (0.5, 0.5, 0))
        noise = rng.normal(scale=5, size=(2, *image.shape))
        image = np.hypot(image + noise[0], noise[1])  # Rician: the magnitude of a complex signal
        return image.astype(np.int16), labels

    def _moved_texture(self, contraction: float) -> np.ndarray:
        """The texture of end-diastole, where contraction has brought it."""
        radius = self.body["radius"] * np.sqrt(1 - 0.85 * self._z**2)
        now = np.hypot(self._x, self._y) + 1e-6
        # In the cavity all comes nearer by one factor. Muscle around it keeps its volume.
        then = np.minimum(now / contraction, np.sqrt(now**2 + radius**2 * (1 - contraction**2)))
        x, y = ((then / now - 1) * a / self.pixel for a in (self._x, self._y))
        cos, sin = np.cos(self.body["turn"]), np.sin(self.body["turn"])
        source = np.indices(now.shape) + np.stack([cos * x - sin * y, sin * x + cos * y, np.zeros_like(x)])
        return map_coordinates(self._texture, source, order=1, mode="nearest")


def _chest(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, body: dict[str, float], spots: np.ndarray
) -> dict[str, np.ndarray]:
    """What lies around the heart: how deep in it each point is, in mm, of each structure, in the order to paint them.

    Args:
        x: mm from the left ventricle's middle, away from the right one.
        y: mm from there towards the diaphragm.
        z: 0 at the base, 1 at the apex.
        body: values drawn from ``ANATOMY``.
        spots: noise whose peaks are vessels.
    """
    trunk = _ellipse(x - 42 - 8 * z, y - 12, 139, 118 - 12 * z)
    wall = trunk - body["skin"]
    lungs = wall - 10
    liver = np.minimum(lungs, _ellipse(x + 38, y - 128 + 22 * z, 118, 72))
    return {
        "skin": trunk,
        "chest wall": wall,
        "ribs": np.minimum(2.5 - abs(wall - 5), 8 * np.cos(9 * np.arctan2(y - 12, x - 42)) - 4),
        "lungs": lungs,
        "lung vessels": np.minimum(lungs - 4, 3 * (spots - 2)),
        "diaphragm": liver + 2.5,  # its fat, that is
        "liver": liver,
        "liver vessels": np.minimum(liver - 6, 3 * (spots - 1.7)),
        "spine": _ellipse(x - 80, y - 68, 25, 21),
        "aortic wall": _ellipse(x - 50, y - 54, 13, 13),
        "aorta": _ellipse(x - 50, y - 54, 11, 11),
    }


def _heart(
    x: np.ndarray, y: np.ndarray, z: np.ndarray, body: dict[str, float], contraction: float
) -> dict[str, np.ndarray]:
    """The heart, as ``_chest``, when ``contraction`` is what remains of the left ventricle's radius."""
    radius = body["radius"] * np.sqrt(1 - 0.85 * z**2)  # base wide, apex narrow
    cavity = radius * contraction
    # The wall thickens as the cavity empties: muscle keeps its volume.
    outer = np.sqrt((radius + body["wall"] * (1 - 0.3 * z)) ** 2 - radius**2 + cavity**2)
    left = _ellipse(x, y, outer, outer)
    # The right ventricle is what the left one leaves of an ellipse between these two distances: a crescent.
    near, far = 0.1 * outer, outer + body["depth"] * (1 - 0.9 * z**1.5) * (0.2 + 0.8 * contraction)
    right = _ellipse(x + (near + far) / 2, y + 0.2 * x, (far - near) / 2, 0.72 * (far - near))
    papillary = [
        _ellipse(x - 0.68 * cavity * np.cos(angle), y - 0.68 * cavity * np.sin(angle), 0.2 * cavity, 0.2 * cavity)
        for angle in (-0.9, 1.4)
    ]
    return {
        "epicardial fat": np.maximum(left, right + 3) + body["fat"] * (1 - x / 60),  # less towards the left lung
        "right wall": right + 3,
        "right ventricle": right,
        "myocardium": left,
        "left ventricle": _ellipse(x, y, cavity, cavity),
        "papillary muscles": np.where(abs(z - 0.5) < 0.3, np.maximum(*papillary), -9),  # ACDC counts them as cavity
    }


def _ellipse(x: np.ndarray, y: np.ndarray, width: np.ndarray | float, height: np.ndarray | float) -> np.ndarray:
    """How many mm, about, each point lies within an ellipse about the origin of these half axes; below 0 outside."""
    return (1 - np.hypot(x / width, y / height)) * np.minimum(width, height)
