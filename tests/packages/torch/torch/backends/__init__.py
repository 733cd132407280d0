"""Libraries that it may have."""

from torch.backends import cudnn
