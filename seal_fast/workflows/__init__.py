"""Whole workflows: scan, calibrate, unlearn."""
