"""Shipped for authors of tiers, codecs and policies: contract suites, clocks, faults, models."""
