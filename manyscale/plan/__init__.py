"""Answers before you pay: what a net will count and cost, without torch."""
