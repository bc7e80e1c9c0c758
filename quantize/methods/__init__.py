"""Quantisation methods: one file each, with a function `quantize(weight, scheme)`."""
