"""LDAdam for sharded training: Adam whose moments live in a low-rank subspace, partitioned like the parameters."""

from ldadam_dist._version import __version__
from ldadam_dist.clipping import clip_grad_norm_
from ldadam_dist.optimizer import LDAdamW
from ldadam_dist.param_groups import build_param_groups, describe
from ldadam_dist.traffic import Traffic

__all__ = ["LDAdamW", "Traffic", "__version__", "build_param_groups", "clip_grad_norm_", "describe"]
