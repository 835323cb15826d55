"""Results for people: tables on a terminal, HTML pages and model cards.

In: records of finished stages. Out: text and self-contained pages.
Invariant: every number shown is in the records.
"""
