"""The target `coreml`: `.mlpackage` for iOS 18 and later, and an evaluator of what was written."""
