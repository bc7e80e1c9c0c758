"""The small typed modules that families are built from. Plain torch, shapes in docstrings."""
