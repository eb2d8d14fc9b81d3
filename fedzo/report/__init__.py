"""From metrics to figures and pages, and what a user can say about them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    """The report of a run, and what it prints."""

    html: bool = True
    """``report.html`` and its figures."""
    progress: bool = True
    """What a run prints while it goes on and at its end: bars, scores, the result. Warnings are printed in any case."""
