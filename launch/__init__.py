"""Entry points: programs that train with ldadam_dist. Run them as files, e.g. ``python launch/pretrain.py``."""
