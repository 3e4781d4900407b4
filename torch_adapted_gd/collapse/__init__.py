"""Collapse of classes, the mathematics: pure functions of tensors, shared by `functional` and `metrics`."""
