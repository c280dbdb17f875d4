"""Models of Hugging Face configurations, on the meta device: shapes without weights, and nothing is downloaded."""

from __future__ import annotations

import difflib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

_logger = logging.getLogger(__name__)


def read_config(path: Path) -> dict[str, Any]:
    """What a config.json says.

    Args:
        path: the file, or a folder that has a config.json.
    Raises:
        ValueError: there is none, or it is no configuration.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        what = f"folder {path} has no config.json" if path.is_dir() else f"there is no {path}"
        raise ValueError(
            f"{what}: expected a Hugging Face config.json, or a folder that has one; nothing is downloaded."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{file} names no model_type: expected the configuration of a model, as config.json is.")
    return config


def build_model(path: Path, dtype: torch.dtype) -> nn.Module:
    """The model of a configuration on the meta device, of the class that `architectures` names, or else a causal LM.

    Args:
        path: as for `read_config`.
        dtype: of its parameters.
    Raises:
        ValueError: no configuration, one with a misspelt key, or of a model that transformers does not know or cannot
            build.
    """
    said = read_config(path)
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ValueError("reading a model needs transformers: pip install 'ldadam-dist[cli]'") from error
    model_type = said.pop("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, transformers.CONFIG_MAPPING.keys())
        raise ValueError(
            f"transformers {transformers.__version__} knows no model_type {model_type!r}, which {path} names."
            + (f" Near names: {', '.join(map(repr, near))}." if near else "")
        )
    try:
        config = transformers.AutoConfig.for_model(model_type, **said)
    except Exception as error:  # of an unknown type, or of whatever the configuration's own class thinks of the values
        raise ValueError(f"transformers {transformers.__version__} does not take {path}: {_line(error)}") from error
    _check_keys(path, said, config)
    names = [name for name in said.get("architectures") or [] if hasattr(transformers, name)]
    try:
        with torch.device("meta"):
            if names:
                model = getattr(transformers, names[0])(config)
            else:
                auto = transformers.AutoModelForCausalLM
                model = (auto if type(config) in auto._model_mapping else transformers.AutoModel).from_config(config)
    except Exception as error:
        raise ValueError(f"the model of {path} cannot be built: {type(error).__name__}: {_line(error)}") from error
    found: nn.Module = model.to(dtype)
    return found


def _check_keys(path: Path, said: dict[str, Any], config: Any) -> None:
    """Refuse a misspelt key, which would leave a default in the place of its value; name others that do nothing.

    Published configurations carry keys of other versions and of other programs: only those that are nearly one that is
    missing are refused.
    """
    try:
        default = type(config)()
    except Exception:  # a few classes have none: their keys are not known
        return
    known = set(vars(default)) | set(config.attribute_map)
    idle = sorted(key for key in said if key in vars(config) and key not in known)  # legacy keys are gone by now
    for key in idle:
        near = difflib.get_close_matches(key, known - set(said), n=1, cutoff=0.85)
        if near:
            raise ValueError(
                f"{path} has a key {key!r} that {type(config).__name__} does not know: {near[0]!r} is meant?"
            )
    if idle:
        _logger.warning("%s: %s does not know, and ignores, %s.", path, type(config).__name__, ", ".join(idle))


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
