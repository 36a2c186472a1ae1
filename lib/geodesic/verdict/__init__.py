"""The paper's claims, judged by records: `evidence.rows`, then `judge.judge(rows, claim)` for each of `claims.CLAIMS`.

| module | one job |
|---|---|
| `evidence` | a record as one flat row of numbers |
| `judge` | from the tests of a claim to a verdict, in words |
| `claims` | the claims with their tests and thresholds |
"""

from geodesic.verdict import claims, evidence, judge

__all__ = [
    "claims",
    "evidence",
    "judge",
]
