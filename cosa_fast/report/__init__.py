"""The report: one HTML page about everything in a results folder, readable anywhere without a network."""

from cosa_fast.report.page import make_report

__all__ = ["make_report"]
