"""The section on statistical methods of a study's report, of what the study did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lownibble.measuring import sequential
from lownibble.study.analysis import POWER
from lownibble.study.decide import LEVEL


def methods(summary: Mapping[str, Any]) -> list[str]:
    """The section's paragraphs."""
    pairs = [pair for group in summary["groups"] for pair in group["pairs"]]
    by_row = sorted({p["equivalence"]["metric"] for p in pairs if p["variances"] and p["variances"]["rows"] > 1})
    whole = sorted({p["equivalence"]["metric"] for p in pairs if p["variances"] and p["variances"]["rows"] == 1})
    looks, n = summary["looks"], summary["comparisons"]
    found = [
        "Methods are paired by seed and by evaluation row. A difference is the mean of a mixed model with random effects of "
        "seeds and of rows (restricted maximum likelihood, in closed form as the data are balanced), so an interval is about "
        "other seeds and other rows than these; its quantile is Cochran and Cox's mean of the t-quantiles of both.",
    ]
    if by_row:
        found[0] += f" Scored by row: {', '.join(by_row)}."
    if whole:
        found[0] += f" Scored over all rows at once, so that intervals are about other seeds and these rows: {', '.join(whole)}."
    found.append(
        "A difference is shown where the interval leaves out 0; equivalence where two one-sided tests reject a difference of the "
        f"margin or more on either side (Schuirmann 1987). Planned comparisons: {n}. By Holm's procedure over them, at "
        f"most {LEVEL:.0%} of such studies show any difference that is not there, and at most {LEVEL:.0%} any equivalence. "
        "Intervals are not corrected for the number of comparisons, and other scores than the first of a task are "
        "described, not decided."
    )
    if len(looks) > 1:
        found.append(
            f"The study looks after {', '.join(map(str, looks[:-1]))} and {looks[-1]} seeds. Of the error a look may have spent "
            f"the share of seeds to the power of {sequential.EXPONENT} (Lan and DeMets 1983, Kim and DeMets 1987); intervals "
            "hold over all looks. A method whose comparisons are all decided on a task is trained with no more seeds: "
            f"{summary['counts']['stopped']} runs were not needed. A "
            "decided comparison is reported as of the look that decided it."
        )
    found.append(
        f"Differences that are likely to show are those that an interval of one look leaves out with a probability of "
        f"{POWER:.0%}, at the variances of these records."
    )
    return found
