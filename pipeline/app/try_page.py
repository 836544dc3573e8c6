"""The Try page: upload an image, see the mask, and change settings interactively."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import cv2
import numpy as np
import streamlit as st

from pipeline.app import page_parts
from pipeline.app.cached_predictions import CachedImage, cached_predictor
from pipeline.app.page_parts import SliderImages, error_markdown, escape_markdown, show_errors, show_slider
from pipeline.competition.image_ids import parse_image_id
from pipeline.config import EnsembleSettings, MergeName, Params, PostStep, read_params
from pipeline.errors import CarvanaError
from pipeline.report.overlays import data_uri, heatmap_overlay
from pipeline.report.tables import MERGE_TITLES
from pipeline.segment.image_loader import ImageLimits, load_image
from pipeline.segment.outputs import cutout_png, mask_png, overlay, rle_row
from pipeline.segment.segmenter import EXPORTS_DIR, SegmentationResult, Segmenter, list_models, model_of
from pipeline.submission.csv_file import CSV_HEADER
from pipeline.utils.arrays import UInt8Array

MAX_UPLOAD_PIXELS = 25_000_000
"""Most pixels of an upload: each net and view takes one byte of memory per pixel."""

Layer = Literal["mask", "probability", "disagreement"]
"""What is shown to the right of the slider."""

_TYPES = ("jpg", "jpeg", "jfif", "png", "webp")
_SAMPLES = 48
"""Number of test images to choose from."""

_EXPORT = ".onnx"

_STEPS: Mapping[PostStep, str] = {
    "refine_edges": "refine edges",
    "keep_largest": "keep largest component",
    "fill_holes": "fill small holes",
}

_LAYERS: Mapping[Layer, str] = {"mask": "Mask", "probability": "Probability", "disagreement": "Disagreement"}


@dataclass(frozen=True)
class TryChoice:
    """The selected nets, views and settings."""

    nets: Sequence[str]
    views: Sequence[str]
    settings: EnsembleSettings


def show() -> None:
    """Draw the page."""
    st.title("Try")
    st.markdown("Upload a photo to segment the car.")
    names = list_models(Path())
    if not names:
        st.info(
            "No nets are trained yet. Run `carvana repro` in the project folder: with the default settings it creates "
            "a small synthetic dataset and trains three small nets in a few minutes. Then reload this page.",
            icon=":material/info:",
        )
        return
    with show_errors():
        params, image = read_params(), _select_image()
        if image is not None:
            _render(image, names, params)


def _select_image() -> CachedImage | None:
    """Show the image inputs; return the selected image, or None if there is none."""
    left, right = st.columns([3, 2], gap="medium")
    limits = ImageLimits(bytes=st.get_option("server.maxUploadSize") << 20, pixels=MAX_UPLOAD_PIXELS)
    allowed = f"JPEG, PNG or WebP, up to {limits.bytes >> 20} MB and {limits.pixels // 1_000_000} megapixels."
    upload = left.file_uploader("Your image", _TYPES, help=f"{allowed} It is not stored.")
    with right:
        image_id = _select_test_image(disabled=upload is not None)
    if upload is not None:
        return _cached(upload.file_id, upload.name, lambda: load_image(upload.getvalue(), upload.name, limits))
    if image_id is not None:
        return _cached(image_id, f"{image_id}.jpg", lambda: page_parts.test_images().image(image_id))
    return None


def _select_test_image(*, disabled: bool) -> str | None:
    """Show the list of test images; return the id of the selected one."""
    try:
        ids = page_parts.test_ids()
    except CarvanaError as error:
        st.caption(f"No test images available: {error_markdown(error)}")
        return None
    image_id: str | None = st.selectbox(
        "Or a test image",
        ids[:: -(-len(ids) // _SAMPLES)],
        format_func=lambda image_id: "car {}, angle {}".format(*parse_image_id(image_id)),
        disabled=disabled,
        help="Remove your image to choose a test image." if disabled else None,
    )
    return image_id


def _cached(key: str, name: str, read: Callable[[], UInt8Array]) -> CachedImage:
    """Return the session's image with its predictions; read it only if it changed."""
    if st.session_state.get("image_key") != key:
        start = time.perf_counter()
        image = CachedImage(name, read())
        image.seconds["reading"] = time.perf_counter() - start
        st.session_state.update(image_key=key, image=image)
    cached: CachedImage = st.session_state["image"]
    return cached


@st.fragment
def _render(image: CachedImage, names: Sequence[str], params: Params) -> None:
    """Draw the image next to the controls; a fragment, so that a changed control redraws nothing else."""
    main, controls = st.columns([3, 1], gap="medium")  # on a phone, the image comes first
    with controls:
        choice = _controls(names, params)
    with main, show_errors():
        if not choice.nets or not choice.views:
            st.info("Choose at least one net and one view.", icon=":material/touch_app:")
            return
        with st.spinner("Predicting ...", show_time=True):
            predictions = image.predict(choice.nets, choice.views, params)
        result = Segmenter({}).combine(predictions, choice.settings)
        layer = st.segmented_control(
            "Show", list(_LAYERS), format_func=_LAYERS.__getitem__, default="mask", required=True
        )
        start = time.perf_counter()
        _draw(image, result, layer, several=len(choice.nets) > 1)
        _show_timing(image, result, choice.nets, time.perf_counter() - start)
        _downloads(image, result)


def _controls(names: Sequence[str], params: Params) -> TryChoice:
    """Show the controls for nets, views and settings; return what is selected."""
    by_model: dict[str, list[str]] = {}
    for name in names:
        by_model.setdefault(name if name.endswith(_EXPORT) else model_of(name), []).append(name)
    # The models of the project's ensemble come first.
    options = list(dict.fromkeys([*(m for m, _ in params.ensemble_members() if m in by_model), *by_model]))
    models = st.pills(
        "Nets",
        options,
        default=options[0],
        format_func=lambda model: model.removeprefix(f"{EXPORTS_DIR}/"),
        selection_mode="multi",
        wrap=True,
    )
    chosen = [name for model in models for name in by_model[model]]
    folds = sorted({_fold(name) for name in chosen if name not in models}, key=lambda fold: (len(fold), fold))
    if len(folds) > 1:
        help_text = "Each fold's net trained on different cars. Several nets are merged."
        folds = st.pills("Folds", folds, default=folds[0], selection_mode="multi", wrap=True, help=help_text)
    nets = [name for name in chosen if name in models or _fold(name) in folds]
    predicted = params.predict.tta
    offered = dict.fromkeys([*predicted.test, *predicted.oof, *predicted.holdout, "identity", "hflip"])
    views = st.pills(
        "Views",
        list(offered),
        default=list(predicted.test),
        format_func=_view_label,
        selection_mode="multi",
        wrap=True,
        help="Test-time augmentation: each net predicts every view, and the probabilities are averaged.",
    )
    return TryChoice(nets, views, _settings(params, nets))


def _fold(name: str) -> str:
    return name.rpartition("/")[2]


def _view_label(view: str) -> str:
    """Return a label for a view such as ``hflip+scale:0.75``."""
    parts = ("original" if p == "identity" else "flipped" if p == "hflip" else p for p in view.split("+"))
    return ", ".join(part.replace("scale:", "size × ") for part in parts)


def _settings(params: Params, nets: Sequence[str]) -> EnsembleSettings:
    """Show the controls for merging and post-processing; model weights are those of the project."""
    ensemble = params.ensemble
    default = min(max(_default_threshold(params, nets), 0.01), 0.99)
    help_text = "Pixels with at least this probability are foreground."
    threshold = st.slider("Threshold", 0.01, 0.99, default, 0.01, help=help_text)
    merge = ensemble.merge
    if len(nets) > 1:
        options: Sequence[MergeName] = get_args(MergeName)
        merge = st.radio("Merge", options, options.index(merge), format_func=MERGE_TITLES.__getitem__)
    steps = st.pills(
        "Post-processing",
        list(_STEPS),
        default=list(ensemble.postprocess),
        format_func=_STEPS.__getitem__,
        selection_mode="multi",
        wrap=True,
    )
    chosen = {"threshold": threshold, "merge": merge, "postprocess": tuple(steps)}
    return ensemble.model_copy(update=chosen)


def _default_threshold(params: Params, nets: Sequence[str]) -> float:
    """Return the project's threshold, or that built into an ensemble export."""
    own = None
    with suppress(CarvanaError):  # shown when the nets are run
        own = cached_predictor(nets[0], params).default_threshold if len(nets) == 1 else None
    return params.ensemble.threshold if own is None else own


def _draw(image: CachedImage, result: SegmentationResult, layer: Layer, *, several: bool) -> None:
    """Show the image to the left of a slider, and a layer to the right of it."""
    width, height = image.shape
    if layer == "mask":
        text = "mask"
        mask_HW = cv2.resize(
            result.mask_HW.view(np.uint8) * np.uint8(255), (width, height), interpolation=cv2.INTER_AREA
        )
        layer_HWC = overlay(image.display_HWC, mask_HW >= 128)
    elif layer == "probability":
        text = "probability, from violet (low) to yellow (high)"
        layer_HWC = heatmap_overlay(image.image_HWC, result.probability_HW, image.box, width)
    else:
        text = "disagreement between nets, brightest where they split evenly" if several else "uncertainty of the net"
        layer_HWC = heatmap_overlay(image.image_HWC, result.disagreement_HW, image.box, width)
    show_slider(SliderImages(image.uri, data_uri(layer_HWC), "image", text, width, height), key="slider")
    st.caption(f"Left of the slider: image. Right: {text}.")


def _show_timing(image: CachedImage, result: SegmentationResult, nets: Sequence[str], drawing: float) -> None:
    """Show the mask coverage and the time of each step."""
    steps = {"Reading": image.seconds["reading"], **{name: image.seconds[name] for name in nets}}
    steps |= {"merging": result.seconds["merge"], "drawing": drawing}
    times = " · ".join(f"{escape_markdown(step)} {1000 * seconds:.0f} ms" for step, seconds in steps.items())
    st.caption(f"Mask coverage: {result.mask_HW.mean():.1%}. {times}.")


def _downloads(image: CachedImage, result: SegmentationResult) -> None:
    """Show download buttons for results at the image's original size; files are created on demand."""
    stem = Path(image.name).stem
    files: Mapping[str, tuple[str, str, Callable[[], bytes | str]]] = {
        "Mask": (f"{stem}_mask.png", "image/png", lambda: mask_png(result.mask_HW)),
        "Cutout": (f"{stem}_cutout.png", "image/png", lambda: cutout_png(image.image_HWC, result.mask_HW)),
        "RLE": (f"{stem}_rle.csv", "text/csv", lambda: f"{CSV_HEADER}\n{rle_row(image.name, result.mask_HW)}"),
    }
    for (label, (file_name, mime, content)), place in zip(files.items(), st.columns(len(files)), strict=True):
        place.download_button(
            label, content, file_name, mime, on_click="ignore", icon=":material/download:", width="stretch"
        )
