"""Programs for serving: ONNX and ``torch.export``, with norms folded into the layers around them.

In: a model, dense or pruned. Out: a file that needs torch or a runtime alone.
Invariant: the program gives what the model gives, at every batch.
"""
