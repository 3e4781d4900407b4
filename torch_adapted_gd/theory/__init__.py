"""The paper in continuous time: flows, fields, paths, definiteness of the kernel, lines between states."""
