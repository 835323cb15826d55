"""Options that commands share: spelled, checked and explained once.

In: words of the command line. Out: plain values, or one sentence that says what is wrong.
Invariant: an option means the same on every command.
"""
