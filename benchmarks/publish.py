"""The benchmark publisher: what the repository says about speed, made from benchmarks/results.json.

    python benchmarks/publish.py

The charts in docs/charts, the tables in docs/performance.md, and the ratios that check.py holds.
"""

from __future__ import annotations

import charts
import pages
import ratios
import results


def main() -> None:
    measured = results.Results.load(results.FILE.read_text("utf-8"))
    charts.draw_all(measured)
    pages.PAGE.write_text(pages.update(pages.PAGE.read_text("utf-8"), measured), "utf-8")
    fresh = ratios.refresh(ratios.load(ratios.FILE.read_text("utf-8")), measured.rounds)
    ratios.FILE.write_text(ratios.dump(fresh), "utf-8")


if __name__ == "__main__":
    main()
