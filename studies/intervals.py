"""What a few seeds can tell: a pooled standard deviation, intervals, Holm's correction, and what would have been seen.

A study runs many cells with few seeds each. The standard deviation of three values is hardly known, but that of a study
is: if chance moves all cells alike, each of them adds to one estimate, for C cells of n seeds::

    s² = Σ_c Σ_i (x_ci - x̄_c)² / (C (n - 1))                               the seeds of each cell, independent
    s² = Σ_c Σ_i (x_ci - x̄_c - x̄_i + x̄)² / ((C - 1) (n - 1))               paired: seed i moves all cells alike

A difference of two means has the 95 % interval ± t · s · √(1/n + 1/m) with t of as many degrees of freedom as stand in
the denominator (Student 1908). Of m differences that are all chance, one in twenty would still be found, so the p of
the k-th smallest is multiplied by m - k + 1 (Holm 1979). And a difference that was not found may be there: in 80 % of
studies such as this one a true difference is found if it is at least::

    (t(1 - α/2) + t(0.8)) · s · √(1/n + 1/m)

    python studies/intervals.py         # an example, step by step
"""

import math
import statistics


def tail(t: float, df: int) -> float:
    """P(|T| > t) of Student's distribution: the finite series of Abramowitz and Stegun (1964, 26.7.3 and 26.7.4).

    >>> round(tail(4.303, 2), 4), round(tail(2.0, 60), 4)
    (0.05, 0.05)
    """
    angle = math.atan2(abs(t), math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    term = total = 0.0 if df == 1 else cosine if df % 2 else 1.0
    for k in range(3 if df % 2 else 2, df - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 1.0 - (2 / math.pi * (angle + sine * total) if df % 2 else sine * total)


def quantile(p: float, df: int) -> float:
    """t with P(T ≤ t) = p, for p of at least 1/2.

    >>> round(quantile(0.975, 2), 3), round(quantile(0.975, 10), 3), round(quantile(0.8, 5), 3)
    (4.303, 2.228, 0.92)
    """
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, df) > 2 * (1 - p) else (low, middle)
    return high


def pooled(groups: list[list[float]], paired: bool = False) -> tuple[float, int, list[float]]:
    """The common standard deviation of groups, its degrees of freedom, and the estimates of single groups, which say
    whether a common one makes sense. Paired: place i of each group is seed i.

    Groups without any spread are left out, such as a policy that never succeeds: they say nothing about the others.

    >>> pooled([[1.0, 3.0], [2.0, 2.0], [5.0, 6.0, 7.0]])
    (1.1547005383792515, 3, [1.4142135623730951, 1.0])
    >>> pooled([[1.0, 3.0], [2.0, 5.0]], paired=True)
    (0.5, 1, [0.5, 0.5])
    """
    groups = [group for group in groups if len(set(group)) > 1]
    share = 1.0
    if paired and groups:
        seeds = [statistics.fmean(values) for values in zip(*groups)]
        groups = [[value - seed for value, seed in zip(group, seeds)] for group in groups]
        share = (len(groups) - 1) / len(groups)  # what the means of the seeds leave of the spread
    df = round(share * sum(len(group) - 1 for group in groups))
    if not df:
        return math.nan, 0, []
    squares = [sum((value - statistics.fmean(group)) ** 2 for value in group) for group in groups]
    own = [math.sqrt(square / (share * (len(group) - 1))) for square, group in zip(squares, groups)]
    return math.sqrt(sum(squares) / df), df, own


def holm(ps: list[float]) -> list[float]:
    """The p of each comparison, corrected for their number; none is smaller than that of a clearer one.

    >>> holm([0.02, 0.01, 0.8])
    [0.04, 0.03, 0.8]
    """
    corrected, least = [0.0] * len(ps), 0.0
    for k, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        least = corrected[i] = max(least, min(1.0, ps[i] * (len(ps) - k)))
    return corrected


def smallest(error: float, df: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """The true difference that is found at the level ``alpha`` with this power; error: s · √(1/n + 1/m)."""
    return (quantile(1 - alpha / 2, df) + quantile(power, df)) * error


def example() -> None:
    """Three cells of three seeds, by hand."""
    cells = {"reference": [0.90, 0.92, 0.88], "one": [0.85, 0.88, 0.85], "two": [0.89, 0.91, 0.90]}
    s, df, _ = pooled(list(cells.values()))
    error = s * math.sqrt(2 / 3)
    print(f"pooled standard deviation {s:.4f}, {df} degrees of freedom, t {quantile(0.975, df):.3f}")
    means = {name: statistics.fmean(values) for name, values in cells.items()}
    differences = {name: means[name] - means["reference"] for name in ("one", "two")}
    ps = [tail(difference / error, df) for difference in differences.values()]
    for (name, difference), p, corrected in zip(differences.items(), ps, holm(ps)):
        print(f"{name}: {difference:.3f} ± {quantile(0.975, df) * error:.3f}, p {p:.3f}, Holm's {corrected:.3f}")
    print(f"found in 80 % of such studies: {smallest(error, df):.3f} alone, {smallest(error, df, 0.05 / 2):.3f} of two")
    print("the reference's own three seeds alone: {:.4f} with {}".format(*pooled([cells["reference"]])))


if __name__ == "__main__":
    example()
