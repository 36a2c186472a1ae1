"""The paper's claims, judged by records: `judge.judge(evidence.rows(), claims.CLAIMS)`.

| module | one job |
|---|---|
| `evidence` | a record as one flat row of numbers |
| `judge` | from the tests of the claims to a table of verdicts |
| `claims` | the claims with their tests and thresholds |
| `page` | verdicts as sentences, a table and strips of dots |
"""

from geodesic.verdict import claims, evidence, judge, page

__all__ = [
    "claims",
    "evidence",
    "judge",
    "page",
]
