"""Test set size for a 95 % interval of given width: python -m lungjax.power --auc=0.85 --width=0.1 --prevalence=0.3

Prints the patients that a test set needs for an expected AUC, sensitivity or specificity, or the expected width:

    python -m lungjax.power --auc=0.85 --positives=100 --width=0.1           # the negatives needed
    python -m lungjax.power --auc=0.85 --positives=50 --negatives=100        # the width
    python -m lungjax.power --sensitivity=0.9 --width=0.1 --prevalence=0.3   # the positives needed, and all patients
    python -m lungjax.power --specificity=0.9 --negatives=200                # the width

The interval of the AUC is AUC +- 1.96 standard errors with the variance of Hanley and McNeil (Radiology 143:29, 1982);
that of a proportion is Wilson's (J. Am. Stat. Assoc. 22:209, 1927). Both assume independent patients: if patients have
several images, count patients. The width is that at the expected value; in about half of studies, it is larger. This
plans the precision of one estimate, not the power of a comparison.
"""

import bisect
import math
from collections.abc import Mapping

from absl import flags
from scipy import special

from lungjax import cli
from lungjax.evaluation import bootstrap

FLAGS = flags.FLAGS
MAX_PATIENTS = 10**9
COUNTS = {"auc": ("positives", "negatives"), "sensitivity": ("positives",), "specificity": ("negatives",)}


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_float("auc", None, "Expected area under the ROC curve.")
    flags.DEFINE_float("sensitivity", None, "Expected sensitivity, a proportion of the positives.")
    flags.DEFINE_float("specificity", None, "Expected specificity, a proportion of the negatives.")
    flags.DEFINE_float("width", None, "Width of the 95 % interval; without it, the width is computed.")
    flags.DEFINE_float(
        "prevalence", None, "Share of positives, unless both numbers are given; default with --auc: 0.5."
    )
    flags.DEFINE_integer("positives", None, "Number of patients with the finding.", lower_bound=1)
    flags.DEFINE_integer("negatives", None, "Number of patients without it.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Prints the numbers of patients and the interval."""
    names = (*COUNTS, "width", "prevalence", "positives", "negatives")
    given = {name: FLAGS[name].value for name in names if FLAGS[name].value is not None}
    print(plan(given))


def plan(given: Mapping[str, float]) -> str:
    """Returns the result in words; `given` are the flags with a value. Raises ValueError if they do not fit."""
    metrics = [name for name in COUNTS if name in given]
    if len(metrics) != 1:
        raise ValueError(f"give one of --auc, --sensitivity and --specificity; got {' and '.join(metrics) or 'none'}")
    metric = metrics[0]
    for name in {metric, "width", "prevalence"} & given.keys():
        if not 0 < given[name] < 1:
            raise ValueError(f"--{name}={given[name]:g}: expected a number above 0 and below 1")
    known = {name: int(given[name]) for name in COUNTS[metric] if name in given}
    missing = [name for name in COUNTS[metric] if name not in known]
    prevalence = ["prevalence"] if metric != "auc" or len(missing) == 2 else []
    unused = given.keys() - {metric, "width", *COUNTS[metric], *prevalence}
    if unused:
        raise ValueError(f"--{min(unused)} has no effect with {', '.join(f'--{name}' for name in (metric, *known))}")
    if ("width" in given) == (not missing):
        counts = " and ".join(f"--{name}" for name in COUNTS[metric])
        raise ValueError(f"give --width to compute patients, or {counts} to compute the width, but not all of them")
    odds = 1 / given.get("prevalence", 0.5) - 1

    def numbers(n: int) -> dict[str, int]:
        """Returns the counts, with n for the unknown one; if both are, n is that of the positives."""
        unknown = {"positives": n, "negatives": math.ceil(n * odds - 1e-9) if len(missing) == 2 else n}
        return {name: known.get(name, unknown[name]) for name in COUNTS[metric]}

    def width(n: int) -> float:
        low, high = interval(metric, given[metric], numbers(n))
        return high - low

    n = 1
    if "width" in given:
        n += bisect.bisect_left(range(1, MAX_PATIENTS), True, key=lambda n: width(n) <= given["width"])
        if n == MAX_PATIENTS:
            fixed = " and ".join(f"{count:,} {name}" for name, count in known.items()) or f"{n:,} patients"
            raise ValueError(f"--width={given['width']:g} is out of reach with {fixed}; give a larger number or width")
    result, (low, high) = numbers(n), interval(metric, given[metric], numbers(n))
    patients = " and ".join(f"{count:,} {name}" for name, count in result.items())
    patients += f" ({sum(result.values()):,} patients)" if len(result) > 1 else ""
    if metric != "auc" and "prevalence" in given:
        share = given["prevalence"] if metric == "sensitivity" else 1 - given["prevalence"]
        every = math.ceil(sum(result.values()) / share - 1e-9)
        patients += f" (of {every:,} patients at a prevalence of {given['prevalence']:g})"
    elif len(missing) == 2:
        patients += f" at a prevalence of {1 / (odds + 1):g}"
    poor = " (the normal approximation is poor: its interval exceeds 0 to 1)" if high > 1 or low < 0 else ""
    ends = f"{max(low, 0):.3f} to {min(high, 1):.3f}{poor}"
    name = metric.replace("auc", "AUC")
    return f"{name} {given[metric]:g}, {patients}: 95 % interval {ends}, width {high - low:.3f}"


def interval(metric: str, value: float, counts: Mapping[str, int]) -> tuple[float, float]:
    """Returns the expected 95 % interval; that of an AUC may exceed 0 to 1, where the approximation is poor."""
    if metric != "auc":
        (n,) = counts.values()
        low, high = bootstrap.wilson(value * n, n)
        return low, high
    m, n = counts["positives"], counts["negatives"]
    q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)
    variance = (value * (1 - value) + (m - 1) * (q1 - value**2) + (n - 1) * (q2 - value**2)) / (m * n)
    half = float(special.ndtri(0.975)) * math.sqrt(variance)
    return value - half, value + half


if __name__ == "__main__":
    cli.run(main, define_flags)
