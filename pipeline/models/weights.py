"""Weights in files: read, check, match by name, write."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.config import EncoderConfig, InputSettings, ModelConfig
from pipeline.errors import CarvanaError, is_out_of_memory
from pipeline.utils.files import atomic_write, write_json
from pipeline.workspace import CONFIG, WeightsFile, local_encoder_weights

StateDict = Mapping[str, Tensor]

_MODULES = ("module", "_orig_mod")
"""What DataParallel and torch.compile put into names, also between other parts."""

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "ema_state_dict", "ema", "weights")
"""Keys under which checkpoints of other programs have the weights."""


def save_weights(path: Path, state: StateDict) -> None:
    """Write weights as safetensors; the file appears whole or not at all."""
    with atomic_write(path) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, temporary)


def save_config(folder: Path, spec: ModelConfig, input: InputSettings, facts: Mapping[str, Any]) -> None:
    """Write what ``load_model`` needs to build the net, and ``facts`` about it for people."""
    config = {"architecture": spec.model_dump(exclude={"input", "train"}), "input": input.model_dump(), **facts}
    write_json(folder / CONFIG, config)


def load_weights(net: nn.Module, path: Path) -> None:
    """Load weights into ``net``; raises CarvanaError that names what does not fit."""
    state = match_names(net.state_dict().keys(), read_weights(path))
    unknown = sorted(set(state) - set(net.state_dict()))
    if unknown:
        raise CarvanaError(
            f"{path} has weights of another architecture: the net has no '{unknown[0]}' ({len(unknown)} such names)."
        )
    load_strict(net, state, path)


def read_weights(path: Path) -> StateDict:
    """Return the weights of a .safetensors file, or of a PyTorch file with nothing but tensors."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CarvanaError(f"{path} does not exist. Check the path of the weights.") from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        if is_out_of_memory(error):
            raise
        raise CarvanaError(f"{path} is not a file of weights ({error}). Is it complete?") from error
    except Exception as error:  # torch.load raises errors of many types for what it does not unpickle
        # Not torch's own message, which advises to run the code in the file.
        raise CarvanaError(f"{path} is not a plain state dict. Save it as .safetensors.") from error
    weights = _unwrap(state)
    if not weights:
        found = ", ".join(map(str, list(state)[:5])) if isinstance(state, Mapping) else type(state).__name__
        raise CarvanaError(f"{path} has no named weights, only: {found or 'nothing'}. Save the state_dict of a net.")
    return weights


def _unwrap(content: Any) -> StateDict:
    """Return the weights in what ``torch.load`` gave: by themselves, or in a checkpoint; empty if there are none."""
    if not isinstance(content, Mapping):
        return {}
    inner = (_unwrap(content[key]) for key in _WRAPPERS if isinstance(content.get(key), Mapping))
    own = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    return next((weights for weights in inner if weights), own)


def load_strict(module: nn.Module, state: StateDict, path: Path) -> None:
    """Load exactly the weights that ``module`` wants; raises CarvanaError that names the first one at fault."""
    wanted = {name: value.shape for name, value in module.state_dict().items()}
    missing = sorted(set(wanted) - set(state))
    unfit = sorted(name for name in set(wanted) & set(state) if state[name].shape != wanted[name])
    if missing or unfit:
        name = (missing or unfit)[0]
        reason = (
            f"'{name}' is missing" if missing else f"'{name}' is {list(state[name].shape)}, not {list(wanted[name])}"
        )
        raise CarvanaError(f"{path} has weights of another architecture: {reason} ({len(missing + unfit)} such names).")
    broken = non_finite_name(state)
    if broken is not None:
        raise CarvanaError(f"{path}: '{broken}' contains NaN or infinity. Train the net again with a lower train.lr.")
    module.load_state_dict({name: state[name] for name in wanted})


def non_finite_name(state: StateDict) -> str | None:
    """Return the name of the first tensor that contains NaN or infinity, None where all are finite.

    Outputs alone do not show it: convolutions in bf16 on a CPU give finite numbers for infinite weights.
    """
    return next((name for name, value in state.items() if not torch.isfinite(value).all()), None)


def initial_weights(spec: ModelConfig, init_checkpoint: Path | None = None) -> dict[str, str] | None:
    """Return ``source``, ``file`` and ``sha256`` of the weights that a net starts from, or None without any.

    Weights that only a hub has are downloaded. Raises CarvanaError if there are no such weights.
    """
    if init_checkpoint is not None:
        if not init_checkpoint.is_file():
            raise CarvanaError(f"{init_checkpoint} does not exist. Check train.init_checkpoint.")
        return WeightsFile(init_checkpoint, "file").facts()
    start = encoder_weights_source(spec.encoder, spec.encoder_weights) if isinstance(spec, EncoderConfig) else None
    return start.facts() if start else None


def encoder_weights_source(encoder: str, weights: str | None) -> WeightsFile | None:
    """Return the file of an encoder's weights, downloaded if only a hub has it; None for random weights.

    Raises CarvanaError if the encoder has no such weights, or if they cannot be downloaded.
    """
    if weights is None or (local := local_encoder_weights(encoder, weights)):
        return None if weights is None else local
    try:
        return _hub_file(encoder, weights)
    except LookupError as error:
        raise CarvanaError(
            f"Encoder '{encoder}' has no weights '{weights}'. Set encoder_weights to imagenet, a file or null."
        ) from error
    except Exception as error:  # hubs raise errors of many libraries
        raise CarvanaError(
            f"The '{weights}' weights of encoder '{encoder}' cannot be downloaded ({first_line(error)}). Check the "
            "network, or set encoder_weights to a local file (docs/pretrained.md), or to null for random weights."
        ) from error


def _hub_file(encoder: str, weights: str) -> WeightsFile:
    """Return the file of a hub, from its cache if it is there; raises LookupError if no hub has these weights."""
    # Imported here: they take seconds, and nets without an encoder do not need them.
    from huggingface_hub import hf_hub_download
    from segmentation_models_pytorch.encoders import encoders
    from timm.models import get_pretrained_cfg, is_model_pretrained
    from timm.models._hub import download_cached_file

    if not encoder.startswith("tu-"):
        settings = encoders[encoder]["pretrained_settings"][weights]
        repository, revision = settings["repo_id"], settings["revision"]
    else:
        name = encoder.removeprefix("tu-")
        config = get_pretrained_cfg(name) if is_model_pretrained(name) else None
        # timm would load its default weights for any name.
        if weights != "imagenet" or config is None:
            raise LookupError(encoder)
        repository, revision = config.hf_hub_id, None
        if not repository:
            return WeightsFile(Path(download_cached_file(str(config.url), check_hash=False)), f"hub {config.url}")
    path = Path(hf_hub_download(repository, "model.safetensors", revision=revision))
    return WeightsFile(path, f"hub {repository}@{path.parent.name}")


def load_encoder(encoder: nn.Module, file: WeightsFile) -> None:
    """Load weights of ImageNet or the like into an encoder; raises CarvanaError that names what does not fit.

    Names may differ by a prefix, or in full where the shapes agree one after another.
    """
    wanted, state = encoder.state_dict(), read_weights(file.path)
    try:
        load_strict(encoder, match_order(wanted, match_names(wanted.keys(), state)), file.path)
    except CarvanaError as error:
        raise CarvanaError(f"{error} Set encoder_weights to a file of this encoder, to imagenet or to null.") from error


def match_order(wanted: StateDict, state: StateDict) -> StateDict:
    """Return ``state`` under the names in ``wanted``, if it lacks some but all shapes agree, one after another.

    So weights of another implementation of the same network are found; ``state`` may go on, with a classifier's. The
    last part of each name, such as ``bias``, must agree too: files may be sorted by name.
    """
    if set(wanted) <= set(state) or len(state) < len(wanted):
        return state
    pairs = list(zip(wanted, state, strict=False))
    agree = all(
        wanted[name].shape == state[other].shape and name.rpartition(".")[2] == other.rpartition(".")[2]
        for name, other in pairs
    )
    return {name: state[other] for name, other in pairs} if agree else state


def match_names(wanted: Collection[str], state: StateDict) -> StateDict:
    """Return ``state`` under the names that a module wants, where they differ by one prefix only.

    A file may have the weights under ``module.`` (DataParallel), ``_orig_mod.`` (torch.compile), ``model.`` or
    ``net.``, or without a prefix that the module has. Returns the state as it is if no prefix makes names match.
    """
    variants = [state, {_without_modules(name): value for name, value in state.items()}]
    candidates = [change for variant in variants for change in _prefix_changes(wanted, variant)]
    best = max(candidates, key=lambda candidate: len(set(wanted) & set(candidate)))
    return best if set(wanted) & set(best) else state


def _prefix_changes(wanted: Collection[str], state: StateDict) -> Iterator[StateDict]:
    """Yield ``state`` with each prefix removed or added that makes the first or last name match."""
    changes = {("", "")}
    for name in (min(wanted), max(wanted)):
        changes |= {(found.removesuffix(name), "") for found in state if found.endswith(f".{name}")}
        changes |= {("", name.removesuffix(found)) for found in state if name.endswith(f".{found}")}
    for removed, added in sorted(changes):
        yield {added + name.removeprefix(removed): value for name, value in state.items() if name.startswith(removed)}


def _without_modules(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _MODULES)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, shortened, or the error's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip("\"'. ")[:300]
