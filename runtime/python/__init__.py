"""The thin runtime: a bundle and pictures in, streamed text out. numpy and an engine, no torch."""
