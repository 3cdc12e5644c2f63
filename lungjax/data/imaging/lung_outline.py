"""The outline of one lung where a lesion took its edge away."""

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage, spatial

DEEP = 0.08  # area of a bay by its opening squared, above which the outline is not just a little flat there
DEPTH = 0.9  # how far into the body a bay may be filled, by the width of its opening
PALER = 0.15  # of the step from lung to tissue; how much more air a lesion holds than the tissue behind it


def complete(lung: np.ndarray, gray: np.ndarray, medial: int) -> np.ndarray:
    """Returns one lung, bool [h, w], with what a lesion at the chest wall took out of it.

    `gray` is the image, [h, w]; `medial` is the sign of x towards the other lung. No lung may touch the edge.

    The chest wall is convex, so a bay of the outline that opens outwards is lung; the bays towards the middle are
    heart, vessels and spine, and a wide one towards the front is the dome of liver or spleen. The wall across a
    bay is drawn as the arc that goes on from the outline at its two ends.
    """
    edge = np.argwhere(lung & ~ndimage.binary_erosion(lung))
    if len(edge) < 12 or (np.ptp(edge, 0) < 3).any():
        return lung
    corners = edge[spatial.ConvexHull(edge).vertices].astype(np.float64)
    labels, count = ndimage.label(_polygon(lung.shape, corners) & ~lung)
    if not count:
        return lung
    centre, area, out = edge.mean(0), lung.sum(), lung.copy()
    ahead = np.roll(corners, -1, 0)
    chord = np.hypot(*(ahead - corners).T)
    normal = np.stack([ahead[:, 1] - corners[:, 1], corners[:, 0] - ahead[:, 0]], 1) / chord[:, None]
    normal *= np.sign(np.sum(normal * ((corners + ahead) / 2 - centre), 1, keepdims=True))
    outwards = normal[:, 1] * medial < 0.3
    opens: dict[int, set[int]] = {}  # per side of the hull, the bays that open there
    for i in np.flatnonzero(chord > 4).tolist():
        across = np.rint(np.linspace(corners[i], ahead[i], int(chord[i]) + 1) - normal[i]).astype(int)
        if bays := set(labels[across[:, 0], across[:, 1]].tolist()) - {0}:
            opens[i] = bays
    through = set().union(*(bays for i, bays in opens.items() if not outwards[i]))
    for i, bays in opens.items():
        if not outwards[i]:
            continue
        points = np.argwhere(np.isin(labels, list(bays)))
        if bays & through:
            if normal[i, 1] * medial > -0.2:
                continue
            # A lesion that reaches through to the heart has one bay with it: only the part near the wall is lung.
            across = np.stack([normal[i], (ahead[i] - corners[i]) / chord[i]], 1)
            away = (points - (corners[i] + ahead[i]) / 2) @ across / chord[i]
            near = (away[:, 0] / DEPTH) ** 2 + (away[:, 1] / 0.6) ** 2 < 1
            if not _paler(gray, lung, points[near], points[~near]):
                continue
            points = points[near]
        if len(points) < (0.5 if normal[i, 0] > -0.7 or normal[i, 1] * medial < -0.2 else 0.1) * area:
            out[points[:, 0], points[:, 1]] = True
            if len(points) > DEEP * chord[i] ** 2:
                out |= _polygon(lung.shape, _arc(corners, i, normal[i]))
    return out


def _paler(gray: np.ndarray, lung: np.ndarray, part: np.ndarray, rest: np.ndarray) -> bool:
    """Whether a part of a bay holds more air than the rest: a lesion, not the liver or the spleen itself."""
    if not len(part) or not len(rest):
        return bool(len(part))
    air, solid = np.median(gray[lung]), np.median(gray[rest[:, 0], rest[:, 1]])
    return bool(solid - np.mean(gray[part[:, 0], part[:, 1]]) > PALER * (solid - air))


def _polygon(shape: tuple[int, ...], corners: np.ndarray) -> np.ndarray:
    """Returns a filled polygon, its outline included, of corners [n, 2] in rows and columns."""
    canvas = Image.new("1", (shape[1], shape[0]))
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for y, x in corners], fill=1)
    return np.asarray(canvas)


def _arc(corners: np.ndarray, i: int, normal: np.ndarray) -> np.ndarray:
    """Returns points on the chest wall from hull corner i to the next one."""
    n = len(corners)
    a, b = corners[i], corners[(i + 1) % n]
    along = (b - a) / np.hypot(*(b - a))
    reach = max(8.0, 0.5 * np.hypot(*(b - a)))

    def bend(start: np.ndarray, step: int, first: int, forward: np.ndarray) -> float:
        """The angle by which the outline turns away from the chord within `reach` of its end."""
        k = first
        for _ in range(n - 2):
            k = (k + step) % n
            back = start - corners[k]
            if np.hypot(*back) >= reach:
                break
        back = start - corners[k]
        return float(np.arctan2(back @ normal, back @ forward))

    turn = min(bend(a, -1, i, along), bend(b, 1, (i + 1) % n, -along))
    # The secant of length `reach` and the chord each turn by half of their own arc.
    half = np.clip(turn * np.hypot(*(b - a)) / (np.hypot(*(b - a)) + reach), 0.0, 1.2)
    t = np.linspace(0, 1, 17)[:, None]
    rise = 0.5 * np.tan(half / 2) * np.hypot(*(b - a))
    return a + t * (b - a) + normal * rise * 4 * t * (1 - t)
