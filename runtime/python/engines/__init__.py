"""What executes the graphs of a bundle."""
