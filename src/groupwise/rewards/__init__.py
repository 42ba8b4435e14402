"""Checkers: what judges one answer."""
