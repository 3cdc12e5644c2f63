"""Restores the outline of one lung where a lesion at the chest wall interrupts it."""

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage, spatial

MIN_DEPTH = 0.08  # area of a bay divided by its squared opening; below, the outline is merely flat
MAX_DEPTH = 0.9  # depth to which a bay that reaches the heart is filled, relative to its opening
MIN_CONTRAST = 0.15  # minimum contrast of a lesion to the tissue behind it, relative to that of lung to tissue


def complete(lung: np.ndarray, gray: np.ndarray, medial: int) -> np.ndarray:
    """Returns the mask of one lung, bool [h, w], extended to include lesions at the chest wall.

    `gray` is the image, [h, w]; `medial` (+1 or -1) points to the other lung. The lung must not touch the border.

    The chest wall is convex, so a concavity (bay) of the outline that opens outwards belongs to the lung. Medial bays
    are the heart, vessels and spine, and a wide anterior one is the dome of the liver or spleen. The wall across a bay
    is an arc that continues the outline at both ends.
    """
    edge = np.argwhere(lung & ~ndimage.binary_erosion(lung))
    if len(edge) < 12 or (np.ptp(edge, 0) < 3).any():
        return lung
    corners = edge[spatial.ConvexHull(edge).vertices].astype(np.float64)
    labels, count = ndimage.label(_polygon(lung.shape, corners) & ~lung)
    if not count:
        return lung
    area, out = lung.sum(), lung.copy()
    ahead = np.roll(corners, -1, 0)
    middle, chord = (corners + ahead) / 2, np.hypot(*(ahead - corners).T)
    normal = np.stack([ahead[:, 1] - corners[:, 1], corners[:, 0] - ahead[:, 0]], 1) / chord[:, None]
    normal *= np.sign(np.sum(normal * (middle - edge.mean(0)), 1, keepdims=True))
    outwards = normal[:, 1] * medial < 0.3
    openings: dict[int, set[int]] = {}  # per side of the hull, the bays that open there
    for i in np.flatnonzero(chord > 4).tolist():
        across = np.rint(np.linspace(corners[i], ahead[i], int(chord[i]) + 1) - normal[i]).astype(int)
        if bays := set(labels[across[:, 0], across[:, 1]].tolist()) - {0}:
            openings[i] = bays
    medial_bays = set().union(*(bays for i, bays in openings.items() if not outwards[i]))
    for i, bays in openings.items():
        if not outwards[i]:
            continue
        points = np.argwhere(np.isin(labels, list(bays)))
        if bays & medial_bays:
            if normal[i, 1] * medial > -0.2:
                continue
            # A lesion that reaches the heart shares a bay with it; only the part near the wall is lung.
            frame = np.stack([normal[i], (ahead[i] - corners[i]) / chord[i]], 1)
            depth, along = ((points - middle[i]) @ frame / chord[i]).T
            near = (depth / MAX_DEPTH) ** 2 + (along / 0.6) ** 2 < 1
            if not _is_darker(gray, lung, points[near], points[~near]):
                continue
            points = points[near]
        if len(points) < (0.5 if normal[i, 0] > -0.7 or normal[i, 1] * medial < -0.2 else 0.1) * area:
            out[points[:, 0], points[:, 1]] = True
            if len(points) > MIN_DEPTH * chord[i] ** 2:
                out |= _polygon(lung.shape, _arc(corners, i, normal[i]))
    return out


def _is_darker(gray: np.ndarray, lung: np.ndarray, part: np.ndarray, rest: np.ndarray) -> bool:
    """Returns whether a part of a bay contains more air than the rest, as a lesion does, unlike liver or spleen."""
    if not len(part) or not len(rest):
        return bool(len(part))
    air, solid = np.median(gray[lung]), np.median(gray[rest[:, 0], rest[:, 1]])
    return bool(solid - np.mean(gray[part[:, 0], part[:, 1]]) > MIN_CONTRAST * (solid - air))


def _polygon(shape: tuple[int, ...], corners: np.ndarray) -> np.ndarray:
    """Returns a filled polygon, outline included, with corners [n, 2] in rows and columns."""
    canvas = Image.new("1", (shape[1], shape[0]))
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for y, x in corners], fill=1)
    return np.asarray(canvas)


def _arc(corners: np.ndarray, i: int, normal: np.ndarray) -> np.ndarray:
    """Returns points on the chest wall from hull corner i to the next one."""
    n = len(corners)
    a, b = corners[i], corners[(i + 1) % n]
    length = np.hypot(*(b - a))
    along, reach = (b - a) / length, max(8.0, 0.5 * length)

    def bend(start: np.ndarray, step: int, first: int, forward: np.ndarray) -> float:
        """Returns the angle by which the outline turns away from the chord within `reach` of `start`."""
        k = first
        for _ in range(n - 2):
            k = (k + step) % n
            back = start - corners[k]
            if np.hypot(*back) >= reach:
                break
        return float(np.arctan2(back @ normal, back @ forward))

    angle = min(bend(a, -1, i, along), bend(b, 1, (i + 1) % n, -along))
    # The secant of length `reach` and the chord each turn by half of their own arc.
    half = np.clip(angle * length / (length + reach), 0.0, 1.2)
    t = np.linspace(0, 1, 17)[:, None]
    rise = 0.5 * np.tan(half / 2) * length
    return a + t * (b - a) + normal * rise * 4 * t * (1 - t)
