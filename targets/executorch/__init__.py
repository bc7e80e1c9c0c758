"""ExecuTorch: `.pte` files of several methods, for the stock mobile modules."""
