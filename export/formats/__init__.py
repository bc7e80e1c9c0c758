"""The file formats that weights are published in, one module each."""
