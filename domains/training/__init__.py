"""Fine-tuning on the source domains, resumable at any epoch.

In: a model, a split and settings. Out: the model of the best epoch by the sources' validation.
Invariant: the target domain has no part in training or selection.
"""
