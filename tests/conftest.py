"""Settings for every test: hypothesis without a deadline, since machines differ."""

from hypothesis import settings

settings.register_profile("depgraph-prune", deadline=None, max_examples=50)
settings.load_profile("depgraph-prune")
