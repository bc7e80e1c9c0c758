"""The target `coreai`: assets for Core AI, the engine of iOS and macOS 27."""
