"""Settings for every test: hypothesis without a deadline, and one thread, since machines differ."""

import torch
from hypothesis import settings

settings.register_profile("depgraph-prune", deadline=None, max_examples=50)
settings.load_profile("depgraph-prune")
# The models here are so small that threads would only wait for each other.
torch.set_num_threads(1)
