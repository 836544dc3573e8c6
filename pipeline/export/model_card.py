"""The model card of the exports: the net, verification results of each file, usage and limitations."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.config import InputSettings
from pipeline.export.verification import MAX_DICE_DROP, MAX_DIFFERENCE
from pipeline.models.networks import SegmentationModel
from pipeline.models.resize import LOGIT_CLAMP
from pipeline.workspace import CONFIG


def describe_net(folder: Path, net: SegmentationModel, cv_scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a trained net for card.json.

    ``cv_scores``: the out-of-fold scores of its model; empty if unknown.
    """
    config = _read(folder / CONFIG)
    return {
        "model": config.get("model", folder.name),
        "fold": config.get("fold"),
        "architecture": config["architecture"],
        "input": config["input"],
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "stride": net.stride,
        "training": _read(folder / "metrics.json") | {"timing": _read(folder / "timing.json")},
        "out_of_fold": dict(cv_scores),
    }


def render_card(card: Mapping[str, Any], descriptions: Mapping[str, str]) -> str:
    """Return the content of card.json as Markdown; ``descriptions`` by format."""
    environment = Environment(
        loader=PackageLoader("pipeline.export", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown without user input
    )
    environment.filters |= {"bytes": format_bytes, "rate": format_rate}
    net, formats = card["net"], card["formats"]
    return environment.get_template("model_card.md.j2").render(
        net=net,
        about=dict(_about(net)),
        input=InputSettings.model_validate(net["input"]),
        formats=formats,
        descriptions=descriptions,
        images=max(entry["images"] for entry in formats.values()),
        machines=sorted({entry["machine"] for entry in formats.values()}),
        outdated=[name for name, entry in formats.items() if not _is_current(entry, net["digests"])],
        clamp=LOGIT_CLAMP,
        max_dice_drop=MAX_DICE_DROP,
        max_difference=MAX_DIFFERENCE,
    )


def format_bytes(size: int) -> str:
    """Return a size in MB or kB."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def format_rate(per_second: float) -> str:
    """Return a rate with two significant digits."""
    return f"{per_second:.2g}" if per_second < 10 else f"{per_second:.0f}"


def _about(net: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    input, training, scores = InputSettings.model_validate(net["input"]), net["training"], net["out_of_fold"]
    yield "architecture", _architecture(net["architecture"])
    yield "parameters", f"{net['parameters']:,}"
    resized = "" if input.size == "native" else ", resized by area averaging"
    colors = "RGB" if input.channels == "rgb" else "gray"
    yield "input", f"{colors}, {input.height} x {input.width} (height x width){resized}"
    yield "training data", f"all folds except {net['fold']}"
    if "dice" in training:
        yield "validation Dice of this net", f"{training['dice']:.4f}"
    if "training_seconds" in training["timing"]:
        timing = training["timing"]
        yield "training time", f"{timing['training_seconds'] / 60:.1f} minutes on {timing['device']}"
    if "dice" in scores:
        images, cars = scores["images"], scores["cars"]
        yield "out-of-fold Dice of its model", f"{scores['dice']:.4f}, on {images} images of {cars} cars"


def _architecture(spec: Mapping[str, Any]) -> str:
    if spec["architecture"] == "unet":
        return f"U-Net, {'-'.join(map(str, spec['widths']))} channels"
    channels = "-".join(map(str, spec["decoder_channels"]))
    return f"U-Net, encoder {spec['encoder']}, {spec.get('upsampling', 'nearest')} upsampling, {channels} channels"


def _is_current(entry: Mapping[str, Any], digests: Mapping[str, str]) -> bool:
    """Return whether a file contains the model's current nets."""
    return all(digests.get(fold) == digest for fold, digest in entry["nets"].items())


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; empty if it is missing, as in nets of older versions."""
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
