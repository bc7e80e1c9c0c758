"""Slow and plain oracles for the methods, one number at a time; only tests use them."""
