"""Pretrain a Llama on real text, with LDAdamW or AdamW, on one device or many.

python launch/pretrain.py --config configs/pretrain/default.yaml
torchrun --standalone --nproc-per-node 2 launch/pretrain.py --config configs/pretrain/default.yaml --optimizer adamw
deepspeed --num_gpus 2 launch/pretrain.py --config configs/pretrain/default.yaml \\
    --deepspeed configs/deepspeed/zero2.json
"""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

# Run as a file, Python looks for modules in launch/ alone: name the repository as well.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.config import ConfigError, one_line, parse_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, also when a signal asked to stop and a checkpoint was saved; 1 when the training diverged or a
    checkpoint could not be written; 2 for options or data that cannot be used; 130 when Ctrl-C ended it unsaved.
    """
    config = parse_config(arguments)

    # After the options are checked: these take seconds to import.
    from launch import distributed, lock
    from launch.checkpoint import CheckpointError
    from launch.stopping import INTERRUPTED
    from launch.trainer import Trainer

    world = None
    try:
        world = distributed.start(config.model.deepspeed is not None, config.run.timeout_minutes)
        Trainer(config, world).train()
    except (ConfigError, FloatingPointError, CheckpointError, distributed.FailedRankError) as error:
        alone = isinstance(error, CheckpointError) and not isinstance(error.__cause__, distributed.FailedRankError)
        if world is None or world.is_main or alone:
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:  # before the first step, when there is nothing to save
        if world is None or world.is_main:
            print("error: interrupted before the first step", file=sys.stderr, flush=True)
        if world is not None and world.size > 1:
            distributed.leave(INTERRUPTED)
        return INTERRUPTED
    except Exception as error:
        has_others = world is not None and world.size > 1
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            print(f"error: {error}. Free some space and start the same command again", file=sys.stderr, flush=True)
        elif has_others:
            traceback.print_exc()
        else:
            raise
        if has_others:
            distributed.leave(1)
        return 1
    finally:
        lock.release()
        distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
