"""The page Try: a picture, the mask that the project's nets make of it, and what changes it, live."""

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
from pipeline.app.page_parts import SliderImages, compare, error_markdown, escape_markdown, show_errors
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
"""Of an upload, at most: for each net and view, as many levels are kept as the picture has pixels."""

Layer = Literal["mask", "probability", "doubt"]
"""What lies over the picture."""

_TYPES = ("jpg", "jpeg", "png", "webp")
_SAMPLES = 48
"""Test images to choose from."""

_EXPORT = ".onnx"

_STEPS: Mapping[PostStep, str] = {
    "refine_edges": "outline as in the photograph",
    "keep_largest": "largest piece alone",
    "fill_holes": "small holes filled",
}

_LAYERS: Mapping[Layer, str] = {"mask": "Mask", "probability": "Probability", "doubt": "Doubt"}


@dataclass(frozen=True)
class TryChoice:
    """What is asked of the nets, and how their answers become a mask."""

    nets: Sequence[str]
    views: Sequence[str]
    settings: EnsembleSettings


def show() -> None:
    """Draw the page."""
    st.title("Try a net")
    st.markdown("Give it a picture, and see which part of it the nets take for car.")
    names = list_models(Path())
    if not names:
        st.info(
            "No net is trained yet. Run `carvana repro` in the project's folder: with the settings that come with it, "
            "it draws a small sample and trains three small nets in a few minutes. Then load this page again.",
            icon=":material/info:",
        )
        return
    with show_errors():
        params, sight = read_params(), _sight()
        if sight is not None:
            _render(sight, names, params)


def _sight() -> CachedImage | None:
    """Ask for a picture; return it, or None where none is given or it can't be read."""
    left, right = st.columns([3, 2], gap="medium")
    limits = ImageLimits(bytes=st.get_option("server.maxUploadSize") << 20, pixels=MAX_UPLOAD_PIXELS)
    words = f"JPEG, PNG or WebP, up to {limits.bytes >> 20} MB and {limits.pixels // 1_000_000} million pixels."
    upload = left.file_uploader("A picture of your own", _TYPES, help=f"{words} It is not kept.")
    with right:
        image_id = _sample(disabled=upload is not None)
    if upload is not None:
        return _cached(upload.file_id, upload.name, lambda: load_image(upload.getvalue(), upload.name, limits))
    if image_id is not None:
        return _cached(image_id, f"{image_id}.jpg", lambda: page_parts.test_images().image(image_id))
    return None


def _sample(*, disabled: bool) -> str | None:
    """Ask for a test image; return its id."""
    try:
        ids = page_parts.test_ids()
    except CarvanaError as error:
        st.caption(f"There are no test images to choose from: {error_markdown(error)}")
        return None
    image_id: str | None = st.selectbox(
        "Or one of the test images",
        ids[:: -(-len(ids) // _SAMPLES)],
        format_func=lambda image_id: "car {}, angle {}".format(*parse_image_id(image_id)),
        disabled=disabled,
        help="Take your own picture away to come back to these." if disabled else None,
    )
    return image_id


def _cached(key: str, name: str, read: Callable[[], UInt8Array]) -> CachedImage:
    """Return what there is of a picture, and read it only if it is not the one that was looked at before."""
    if st.session_state.get("seen") != key:
        begun = time.perf_counter()
        sight = CachedImage(name, read())
        sight.seconds["reading"] = time.perf_counter() - begun
        st.session_state.update(seen=key, sight=sight)
    kept: CachedImage = st.session_state["sight"]
    return kept


@st.fragment
def _render(sight: CachedImage, names: Sequence[str], params: Params) -> None:
    """Draw the picture beside all that changes it; a change here draws no more than this again."""
    picture, controls = st.columns([3, 1], gap="medium")  # on a phone, the picture comes first
    with controls:
        choice = _choice(names, params)
    with picture, show_errors():
        if not choice.nets or not choice.views:
            st.info("Choose a net and a view at least.", icon=":material/touch_app:")
            return
        with st.spinner("Asking the nets ...", show_time=True):
            looked = sight.predict(choice.nets, choice.views, params)
        masked = Segmenter({}).combine(looked, choice.settings)
        layer = st.segmented_control(
            "Show", list(_LAYERS), format_func=_LAYERS.__getitem__, default="mask", required=True
        )
        begun = time.perf_counter()
        _draw(sight, masked, layer, several=len(choice.nets) > 1)
        _show_timing(sight, masked, choice.nets, time.perf_counter() - begun)
        _downloads(sight, masked)


def _choice(names: Sequence[str], params: Params) -> TryChoice:
    """Ask which nets are to look, in which views, and how a mask is made of what they say."""
    by_model: dict[str, list[str]] = {}
    for name in names:
        by_model.setdefault(name if name.endswith(_EXPORT) else model_of(name), []).append(name)
    # The project's own first.
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
        words = "The net of each fold learned from other cars. Several are merged."
        folds = st.pills("Folds", folds, default=folds[0], selection_mode="multi", wrap=True, help=words)
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
        help="How the picture is shown to the nets. They look once for each view, and what they say is averaged.",
    )
    return TryChoice(nets, views, _settings(params, nets))


def _fold(name: str) -> str:
    return name.rpartition("/")[2]


def _view_label(view: str) -> str:
    """Return a view such as ``hflip+scale:0.75`` in words."""
    parts = ("as it is" if p == "identity" else "mirrored" if p == "hflip" else p for p in view.split("+"))
    return ", ".join(part.replace("scale:", "size × ") for part in parts)


def _settings(params: Params, nets: Sequence[str]) -> EnsembleSettings:
    """Ask how answers become a mask; the weights of models are those of the project."""
    ensemble = params.ensemble
    begun = min(max(_threshold(params, nets), 0.01), 0.99)
    words = "The probability from which on a pixel is car."
    threshold = st.slider("Threshold", 0.01, 0.99, begun, 0.01, help=words)
    merge = ensemble.merge
    if len(nets) > 1:
        options: Sequence[MergeName] = get_args(MergeName)
        merge = st.radio("Merge", options, options.index(merge), format_func=MERGE_TITLES.__getitem__)
    steps = st.pills(
        "Touch-ups",
        list(_STEPS),
        default=list(ensemble.postprocess),
        format_func=_STEPS.__getitem__,
        selection_mode="multi",
        wrap=True,
    )
    chosen = {"threshold": threshold, "merge": merge, "postprocess": tuple(steps)}
    return ensemble.model_copy(update=chosen)


def _threshold(params: Params, nets: Sequence[str]) -> float:
    """Return where to begin: the project's threshold, or that of an export which was made with one of its own."""
    own = None
    with suppress(CarvanaError):  # said where the nets are asked
        own = cached_predictor(nets[0], params).default_threshold if len(nets) == 1 else None
    return params.ensemble.threshold if own is None else own


def _draw(sight: CachedImage, masked: SegmentationResult, layer: Layer, *, several: bool) -> None:
    """Show the picture left of a slider, and a layer right of it."""
    width, height = sight.shape
    if layer == "mask":
        words = "the car, as the mask has it"
        part_HW = cv2.resize(
            masked.mask_HW.view(np.uint8) * np.uint8(255), (width, height), interpolation=cv2.INTER_AREA
        )
        drawn_HWC = overlay(sight.display_HWC, part_HW >= 128)
    elif layer == "probability":
        words = "the probability of car: yellow is sure, violet unlikely"
        drawn_HWC = heatmap_overlay(sight.image_HWC, masked.probability_HW, sight.box, width)
    else:
        words = "where the nets part: bright where half of them say otherwise" if several else "where the net is unsure"
        drawn_HWC = heatmap_overlay(sight.image_HWC, masked.disagreement_HW, sight.box, width)
    compare(SliderImages(sight.uri, data_uri(drawn_HWC), "the picture", words, width, height), key="compare")
    st.caption(f"Left of the slider the picture, right of it {words}.")


def _show_timing(sight: CachedImage, masked: SegmentationResult, nets: Sequence[str], drawing: float) -> None:
    """Say how much is car, and what took how long."""
    stages = {"Reading": sight.seconds["reading"], **{name: sight.seconds[name] for name in nets}}
    stages |= {"merging": masked.seconds["decide"], "drawing": drawing}
    times = " · ".join(f"{escape_markdown(stage)} {1000 * seconds:.0f} ms" for stage, seconds in stages.items())
    st.caption(f"{masked.mask_HW.mean():.1%} of the picture is car. {times}.")


def _downloads(sight: CachedImage, masked: SegmentationResult) -> None:
    """Offer the mask at the picture's own size; files are made when they are asked for."""
    stem = Path(sight.name).stem
    files: Mapping[str, tuple[str, str, Callable[[], bytes | str]]] = {
        "Mask": (f"{stem}_mask.png", "image/png", lambda: mask_png(masked.mask_HW)),
        "Cut-out": (f"{stem}_cutout.png", "image/png", lambda: cutout_png(sight.image_HWC, masked.mask_HW)),
        "Run lengths": (f"{stem}_rle.csv", "text/csv", lambda: f"{CSV_HEADER}\n{rle_row(sight.name, masked.mask_HW)}"),
    }
    for (label, (file_name, mime, made)), place in zip(files.items(), st.columns(len(files)), strict=True):
        place.download_button(
            label, made, file_name, mime, on_click="ignore", icon=":material/download:", width="stretch"
        )
