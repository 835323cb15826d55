"""Makes up in weights for numbers that follow from a width, such as an attention's temperature.

In: the ops between a weight and the value that is to be scaled. Out: factors of its entries.
Invariant: no other value of the model changes.
"""
