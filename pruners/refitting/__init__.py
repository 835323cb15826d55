"""Adapts what is left without training: principal directions, least squares, batch norms.

In: the dense model, the cut one and calibration images. Out: new weights of the same shapes.
Invariant: memory does not grow with the number of images.
"""
