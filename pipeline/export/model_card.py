"""The card of a model's exports, for people: what the net is, what each file measured, how to use it, its limits."""

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


def describe_net(folder: Path, net: SegmentationModel, own_scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``card.json`` says of the net in a trained net's folder, whatever it is exported as.

    ``own_scores`` are those out of fold of its model, empty where they are not known.
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
        "out_of_fold": dict(own_scores),
    }


def render_card(card: Mapping[str, Any], words: Mapping[str, str]) -> str:
    """Return the card of ``card.json`` in Markdown; ``words`` say what each format is."""
    environment = Environment(
        loader=PackageLoader("pipeline.export", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, of our own words and numbers
    )
    environment.filters |= {"bytes": format_bytes, "rate": format_rate}
    net, formats = card["net"], card["formats"]
    return environment.get_template("model_card.md.j2").render(
        net=net,
        about=dict(_about(net)),
        input=InputSettings.model_validate(net["input"]),
        formats=formats,
        words=words,
        images=max(entry["images"] for entry in formats.values()),
        machines=sorted({entry["machine"] for entry in formats.values()}),
        older=[name for name, entry in formats.items() if not _current(entry, net["digests"])],
        clamp=LOGIT_CLAMP,
        most_dice=MAX_DICE_DROP,
        most_difference=MAX_DIFFERENCE,
    )


def format_bytes(size: int) -> str:
    """Return a size for people."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def format_rate(per_second: float) -> str:
    """Return a rate for people, with two digits that count."""
    return f"{per_second:.2g}" if per_second < 10 else f"{per_second:.0f}"


def _about(net: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    input, training, own = InputSettings.model_validate(net["input"]), net["training"], net["out_of_fold"]
    yield "architecture", _architecture(net["architecture"])
    yield "parameters", f"{net['parameters']:,}"
    shrunk = "" if input.size == "native" else ", shrunk by area average"
    colors = "color (RGB)" if input.channels == "rgb" else "gray"
    yield "sees", f"{colors}, {input.height} high x {input.width} wide{shrunk}"
    yield "trained", f"on all folds but {net['fold']}"
    if "dice" in training:
        yield "Dice of this net on the cars of its fold, while training", f"{training['dice']:.4f}"
    if "training_seconds" in training["timing"]:
        timing = training["timing"]
        yield "training took", f"{timing['training_seconds'] / 60:.1f} minutes on {timing['device']}"
    if "dice" in own:
        images, cars = own["images"], own["cars"]
        yield "Dice of its model out of fold", f"{own['dice']:.4f}, on {images} images of {cars} cars"


def _architecture(spec: Mapping[str, Any]) -> str:
    if spec["architecture"] == "unet":
        return f"classic U-Net, {'-'.join(map(str, spec['widths']))} channels"
    channels = "-".join(map(str, spec["decoder_channels"]))
    return f"U-Net, encoder {spec['encoder']}, {spec.get('upsampling', 'nearest')} decoder of {channels} channels"


def _current(entry: Mapping[str, Any], digests: Mapping[str, str]) -> bool:
    """Return whether the nets that a file holds are those that the model has now."""
    return all(digests.get(fold) == digest for fold, digest in entry["nets"].items())


def _read(path: Path) -> dict[str, Any]:
    """Return what a file of a net's folder says, nothing where an older pipeline did not write it."""
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
