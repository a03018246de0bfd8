"""The eager path: local attention in plain tensor operations, tile by tile."""
