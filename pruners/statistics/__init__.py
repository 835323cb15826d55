"""What is measured of a running model: gradients, second moments, the calls of its layers.

In: a model and batches. Out: sums for each parameter or layer, streamed batch by batch.
Invariant: the model comes back as it was.
"""
