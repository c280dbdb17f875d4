"""One thread a process: the matrices are small, and distributed tests run several processes on few cores."""

import torch

torch.set_num_threads(1)
