"""How the probabilities of a patient's (or scan's) images become those of the patient: RULE or RULE:CLASS+CLASS.

    mean       the mean over the images
    max        the highest probability of any image
    top_k      the mean of the k highest ones; k is TOP_FRACTION of the images, rounded up
    noisy_or   1 - product of (1 - p): the probability that any image shows the class, if images were independent

Rules other than the mean apply to the given classes, which few images of a patient may show, such as max:COVID. The
other classes get the remainder in proportion to their means; if the given classes sum to more than 1, they are divided
by the sum. Without classes, a rule applies to all classes.
"""

import numpy as np

from lungjax.config import schema

TOP_FRACTION = 0.25


def aggregate(
    probabilities: np.ndarray,
    classes: tuple[str, ...],
    how: str = "mean",
    member: np.ndarray | None = None,
    exclusive: bool = True,
) -> np.ndarray:
    """Returns the probabilities of each patient, float64 [P, C], given those of the images [N, C].

    `member`, int [N], is the patient of each image, 0 to P - 1; None is one patient. Labels that join classes, such as
    "COV+CAP", are given if one of the classes is. The probabilities of findings are not `exclusive`: each remains as
    the rule gives it.
    """
    p = np.asarray(probabilities, np.float64)
    member = np.zeros(len(p), np.int64) if member is None else member
    rule, names = schema.parse_aggregate(how)
    counts = np.bincount(member)

    def total(values: np.ndarray) -> np.ndarray:
        return np.stack([np.bincount(member, weights=x, minlength=len(counts)) for x in values.T], axis=1)

    means = total(p) / counts[:, None]
    if rule == "mean":
        return means
    if rule == "noisy_or":
        with np.errstate(divide="ignore"):
            scores = -np.expm1(total(np.log1p(-np.minimum(p, 1.0))))
    else:
        k = np.ceil(counts * TOP_FRACTION) if rule == "top_k" else np.ones(len(counts))
        rank = np.empty(p.shape, np.int64)  # of the image among those of its patient
        for i, x in enumerate(p.T):
            order = np.lexsort((-x, member))
            rank[order, i] = np.arange(len(p)) - (np.cumsum(counts) - counts)[member[order]]
        scores = total(np.where(rank < k[member][:, None], p, 0.0)) / k[:, None]
    given = np.asarray([not names or bool({name, *name.split("+")} & {*names}) for name in classes])
    if not exclusive:
        return np.where(given, scores, means)
    chosen, others = np.where(given, scores, 0.0), np.where(given, 0.0, means)
    sums = chosen.sum(axis=1, keepdims=True)  # at least 1 if the others have none, since no score is below the mean
    remainder = np.maximum(1 - sums, 0) / np.maximum(others.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return chosen / np.maximum(sums, 1) + others * remainder
