"""``python -m benchmarks.device``."""

import os

# Asked in the usual way, whether there is a GPU, the driver could not be used after a fork.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

from benchmarks.device.command import main

if __name__ == "__main__":
    main()
