"""Schemes as data, methods one file each, and the plans that combine them."""
