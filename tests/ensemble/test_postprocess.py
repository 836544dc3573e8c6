"""What is done to merged maps before they are masks: edges, the largest piece, small holes; the same for everyone."""

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from pipeline.competition import rle
from pipeline.competition.dice import confusion_counts
from pipeline.competition.image_ids import HEIGHT, WIDTH, parse_image_id
from pipeline.config import EnsembleSettings, PostStep
from pipeline.data.competition_data import CompetitionData
from pipeline.ensemble import postprocess
from pipeline.ensemble.evaluation import EnsembleContext, Evaluation, build_mask_builder
from pipeline.ensemble.merge import MergedMargin, MergeRule
from pipeline.ensemble.postprocess import (
    MAX_HOLE_PIXELS,
    RADIUS,
    MaskBuilder,
    fill_small_holes,
    guided_filter_residual,
    keep_largest_component,
    refine_edges,
)
from pipeline.ensemble.submission_writer import write_submission
from pipeline.errors import CorruptFileError
from pipeline.inference.prediction_store import PredictionStore, PredictJob, write_predictions
from pipeline.inference.probability_map import ProbabilityMap, sum_views
from pipeline.submission.csv_file import read_rows
from tests.fakes.fake_maps import as_maps

Mask = NDArray[np.bool_]
SOME: tuple[tuple[PostStep, ...], ...] = ((), ("keep_largest",), ("fill_holes",), ("keep_largest", "fill_holes"))


def mask_of(*lines: str) -> Mask:
    return np.array([[letter == "#" for letter in line] for line in lines])


def masks() -> st.SearchStrategy[Mask]:
    """Small masks with many pieces and holes, some of them larger than what is filled."""
    sizes = st.integers(1, 40)

    def draw(seed: int, height: int, width: int, car: float, blur: int) -> Mask:
        noise = np.random.default_rng(seed).random((height, width))
        return cv2.blur(noise, (blur, blur)) < np.quantile(noise, car) if blur > 1 else noise < car

    return st.builds(draw, st.integers(0, 999), sizes, sizes, st.floats(0, 1), st.integers(1, 5))


def pieces(mask_HW: Mask, corners: bool) -> Iterator[Mask]:
    """The connected pieces of a mask in reading order, pixel by pixel."""
    steps = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0) and (corners or not (y and x))]
    left = {(int(y), int(x)) for y, x in np.argwhere(mask_HW)}
    while left:
        waiting, piece = [min(left)], np.zeros_like(mask_HW)
        left.remove(waiting[0])
        while waiting:
            y, x = waiting.pop()
            piece[y, x] = True
            near = {(y + b, x + a) for b, a in steps} & left
            left -= near
            waiting.extend(near)
        yield piece


class TestKeepLargest:
    def test_the_larger_piece_stays(self) -> None:
        mask_HW = mask_of("##...", "##.##", "....#")
        assert np.array_equal(keep_largest_component(mask_HW), mask_of("##...", "##...", "....."))

    def test_keep_largest_connects_diagonal_pixels(self) -> None:
        mask_HW = mask_of("##....", "..#..#", "...#..")
        assert np.array_equal(keep_largest_component(mask_HW), mask_of("##....", "..#...", "...#.."))

    def test_of_equal_pieces_the_first_in_reading_order_stays(self) -> None:
        mask_HW = mask_of(".....#", "##...#", "......")
        assert np.array_equal(keep_largest_component(mask_HW), mask_of(".....#", ".....#", "......"))

    @settings(deadline=None, max_examples=150)
    @given(masks())
    def test_equals_walking_from_pixel_to_pixel(self, mask_HW: Mask) -> None:
        before = mask_HW.copy()
        kept_HW = keep_largest_component(mask_HW)
        expected = max(pieces(mask_HW, corners=True), key=np.count_nonzero, default=mask_HW)
        assert np.array_equal(kept_HW, expected)
        assert np.array_equal(keep_largest_component(kept_HW), kept_HW)
        assert np.array_equal(mask_HW, before)


class TestFillHoles:
    def test_a_small_hole_is_filled_and_a_bay_is_not(self) -> None:
        mask_HW = mask_of("#####", "#.#..", "#.###", "#####")
        assert np.array_equal(fill_small_holes(mask_HW), mask_of("#####", "###..", "#####", "#####"))

    def test_fill_holes_treats_diagonal_pixels_as_closed(self) -> None:
        mask_HW = mask_of(".#.", "#.#", ".#.")
        assert np.array_equal(fill_small_holes(mask_HW), mask_of(".#.", "###", ".#."))

    @pytest.mark.parametrize(("width", "kept"), [(MAX_HOLE_PIXELS, False), (MAX_HOLE_PIXELS + 1, True)])
    def test_fill_holes_keeps_large_holes(self, width: int, kept: bool) -> None:
        mask_HW = np.ones((9, 90), np.bool_)
        mask_HW[4, 10 : 10 + width] = False
        assert fill_small_holes(mask_HW).all() != kept

    def test_fill_holes_ignores_gaps_at_the_border(self) -> None:
        for place in ((0, 5), (9, 5), (5, 0), (5, 9)):
            mask_HW = np.ones((10, 10), np.bool_)
            mask_HW[place] = False
            assert np.array_equal(fill_small_holes(mask_HW), mask_HW)

    @settings(deadline=None, max_examples=150)
    @given(masks())
    def test_equals_walking_from_pixel_to_pixel(self, mask_HW: Mask) -> None:
        before = mask_HW.copy()
        expected = mask_HW.copy()
        border = np.ones_like(mask_HW)
        border[1:-1, 1:-1] = False
        for piece in pieces(~mask_HW, corners=False):
            if piece.sum() <= MAX_HOLE_PIXELS and not (piece & border).any():
                expected |= piece
        whole_HW = fill_small_holes(mask_HW)
        assert np.array_equal(whole_HW, expected)
        assert np.array_equal(fill_small_holes(whole_HW), whole_HW)
        assert np.array_equal(mask_HW, before)


@pytest.mark.parametrize("step", [keep_largest_component, fill_small_holes])
@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (1, 1), (1, 7)])
def test_empty_and_full_masks_stay(step: Callable[[Mask], Mask], shape: tuple[int, int]) -> None:
    assert not step(np.zeros(shape, np.bool_)).any()
    assert step(np.ones(shape, np.bool_)).all()


def soft_of(probability_HW: NDArray[np.floating], threshold: float = 0.5) -> MergedMargin:
    """A merged image that fills its box; 0 and 1 are decided."""
    whole = slice(0, probability_HW.shape[0]), slice(0, probability_HW.shape[1])
    open_HW = (probability_HW > 0) & (probability_HW < 1)
    return MergedMargin(whole, (probability_HW - threshold).astype(np.float32), open_HW)


def blurred(seed: int, height: int, width: int) -> NDArray[np.float32]:
    """Probabilities that are decided in many places, and not in others."""
    noise = np.random.default_rng(seed).normal(0, 8, (height, width)).astype(np.float32)
    return np.clip(cv2.GaussianBlur(noise, (0, 0), 4) + np.float32(0.5), 0, 1)


def photograph(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def as_grey(image_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    return cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY).astype(np.float32) / np.float32(255)


def dense_filter(guide_HW: NDArray[np.float32], soft_HW: NDArray[np.float32], radius: int, epsilon: float):
    """The guided filter from its definition, window by window, in doubles, the raster mirrored at its border."""
    size, pad = 2 * radius + 1, 2 * radius
    guide = np.pad(guide_HW.astype(np.float64), pad, "symmetric")
    soft = np.pad(soft_HW.astype(np.float64), pad, "symmetric")
    a, b = (np.zeros((guide.shape[0] - pad, guide.shape[1] - pad)) for _ in "ab")
    for y, x in np.ndindex(a.shape):
        g, p = guide[y : y + size, x : x + size], soft[y : y + size, x : x + size]
        a[y, x] = ((g * p).mean() - g.mean() * p.mean()) / (g.var() + epsilon)
        b[y, x] = p.mean() - a[y, x] * g.mean()
    out = np.zeros(guide_HW.shape)
    for y, x in np.ndindex(out.shape):
        window = slice(y, y + size), slice(x, x + size)
        out[y, x] = a[window].mean() * guide[y + pad, x + pad] + b[window].mean()
    return out


class TestRefineEdges:
    @pytest.mark.parametrize(("radius", "epsilon"), [(2, 1e-3), (3, 1e-1)])
    def test_detail_is_the_guided_filter_less_what_it_does_without_a_photograph(
        self, radius: int, epsilon: float
    ) -> None:
        guide_HW, soft_HW = as_grey(photograph(0, 23, 31)), blurred(1, 23, 31)
        guided = dense_filter(guide_HW, soft_HW, radius, epsilon)
        blind = dense_filter(np.full_like(guide_HW, 0.3), soft_HW, radius, epsilon)
        found = guided_filter_residual(guide_HW, soft_HW, radius, epsilon)
        assert found.dtype == np.float32
        assert np.abs(found - (guided - blind)).max() < 1e-5
        assert np.abs(found).max() > 0.01

    @pytest.mark.parametrize("tile", [16, 37, 256])
    def test_refine_edges_in_tiles_equals_refine_edges_at_once(
        self, monkeypatch: pytest.MonkeyPatch, tile: int
    ) -> None:
        probability_HW, image_HWC = blurred(2, 90, 130), photograph(3, 90, 130)
        soft = soft_of(probability_HW)
        margin_HW = soft.margin_HW + guided_filter_residual(as_grey(image_HWC), soft.margin_HW)
        monkeypatch.setattr(postprocess, "_TILE", tile)
        mask_HW = refine_edges(soft, image_HWC)
        clear_HW = soft.ambiguous_HW & (np.abs(margin_HW) > 1e-5)
        assert np.array_equal(mask_HW[clear_HW], margin_HW[clear_HW] >= 0)
        assert clear_HW.sum() > 0.99 * soft.ambiguous_HW.sum() > 1000
        assert (mask_HW != (soft.margin_HW >= 0)).any()

    @settings(deadline=None, max_examples=30)
    @given(seed=st.integers(0, 999), height=st.integers(1, 60), width=st.integers(1, 60), threshold=st.floats(0.1, 0.9))
    def test_decided_pixels_stay(self, seed: int, height: int, width: int, threshold: float) -> None:
        soft = soft_of(blurred(seed, height, width), threshold)
        mask_HW = refine_edges(soft, photograph(seed, height, width))
        assert np.array_equal(mask_HW[~soft.ambiguous_HW], (soft.margin_HW >= 0)[~soft.ambiguous_HW])

    def test_an_even_photograph_changes_nothing(self) -> None:
        soft = soft_of(blurred(4, 80, 120))
        even = np.full((80, 120, 3), 113, np.uint8)
        assert np.abs(guided_filter_residual(as_grey(even), soft.margin_HW)).max() < 1e-4
        clear_HW = np.abs(soft.margin_HW) > 1e-4
        assert np.array_equal(refine_edges(soft, even)[clear_HW], (soft.margin_HW >= 0)[clear_HW])

    @pytest.mark.parametrize("off", [-2, -1, 1, 2])
    @pytest.mark.parametrize("dark", [True, False])
    def test_a_blurred_outline_is_pulled_to_the_edge_of_the_photograph(self, off: int, dark: bool) -> None:
        image_HWC = np.full((60, 80, 3), 60 if dark else 200, np.uint8)
        image_HWC[:, 40:] = 200 if dark else 60
        ramp = np.clip(0.5 + (np.arange(80) - (40 + off)) / 16, 0, 1)
        mask_HW = refine_edges(soft_of(np.tile(ramp, (60, 1))), image_HWC)
        assert np.array_equal(mask_HW, np.tile(np.arange(80) >= 40, (60, 1)))

    def test_refine_edges_without_ambiguous_pixels(self) -> None:
        probability_HW = np.zeros((20, 30))
        probability_HW[5:9, 3:20] = 1
        assert np.array_equal(refine_edges(soft_of(probability_HW), photograph(0, 20, 30)), probability_HW == 1)


def maps_of(seed: int, counts: Sequence[int], height: int = HEIGHT, width: int = WIDTH) -> list[ProbabilityMap]:
    """A map of each net: certain in most places, in boxes that differ."""
    random, maps = np.random.default_rng(seed), []
    for index, views in enumerate(counts):
        levels = np.rint(255 * blurred(seed + index, height, width)).astype(np.uint8)[None].repeat(views, 0)
        levels[0] //= 2
        levels[:, : random.integers(0, height // 2)] = 0
        levels[:, :, random.integers(width // 2, width + 1) :] = 0
        maps.append(sum_views("a", "v", levels))
    return maps


class TestMergedMargin:
    @settings(deadline=None, max_examples=60)
    @given(
        name=st.sampled_from(["mean_probability", "mean_logit", "majority_vote"]),
        threshold=st.sampled_from([0.0001, 0.3, 0.5, 0.77, 0.9999]),
        nets=st.lists(st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 999_999])), min_size=1, max_size=4),
        around=st.integers(0, 20),
        seed=st.integers(0, 99),
    )
    def test_sign_of_the_margin_is_the_mask(
        self, name: str, threshold: float, nets: list[tuple[int, int]], around: int, seed: int
    ) -> None:
        counts, weights = tuple(n for n, _ in nets), tuple(w for _, w in nets)
        maps, merge = maps_of(seed, counts, 24, 30), MergeRule(name, threshold, counts, weights)  # type: ignore[arg-type]
        soft = merge.margin(maps, around, 24, 30)
        mask_HW = np.zeros((24, 30), np.bool_)
        mask_HW[soft.box] = soft.margin_HW >= 0
        assert np.array_equal(mask_HW, merge.mask(maps, 24, 30))
        assert soft.margin_HW.dtype == np.float32
        assert np.abs(soft.margin_HW).max() <= 1
        if name == "mean_probability":
            levels = [level_map.to_full_size(24, 30)[soft.box] for level_map in maps]
            decided = [(a == 0, a == 255 * m.count) for a, m in zip(levels, maps, strict=True)]
            none, all_ = (np.all([pair[k] for pair in decided], axis=0) for k in (0, 1))
            assert np.array_equal(soft.ambiguous_HW, ~(none | all_))

    def test_margin_box_is_padded_up_to_the_border(self) -> None:
        level_map = ProbabilityMap("a", "v", 1, 3, 20, np.full((4, 5), 200, np.uint8))
        merge = MergeRule("mean_probability", 0.5, (1,), (1,))
        assert merge.margin([level_map], 5, 10, 40).box == (slice(0, 10), slice(15, 30))
        assert merge.margin([level_map], 0, 10, 40).box == (slice(3, 7), slice(20, 25))


@pytest.fixture(scope="module")
def maps() -> list[ProbabilityMap]:
    return maps_of(5, (2, 1))


class TestMaskBuilder:
    merge = MergeRule("mean_probability", 0.5, (2, 1), (1, 1))

    @pytest.mark.parametrize("steps", SOME)
    def test_without_edges_steps_follow_the_merge_and_no_photograph_is_asked_for(
        self, maps: list[ProbabilityMap], steps: tuple[PostStep, ...]
    ) -> None:
        expected = self.merge.mask(maps)
        expected = keep_largest_component(expected) if "keep_largest" in steps else expected
        expected = fill_small_holes(expected) if "fill_holes" in steps else expected
        mask_HW = MaskBuilder(self.merge, steps).mask(maps)
        assert np.array_equal(mask_HW, expected)
        assert (mask_HW.shape, mask_HW.dtype) == ((HEIGHT, WIDTH), np.bool_)

    def test_no_steps_are_the_merge(self, maps: list[ProbabilityMap]) -> None:
        assert np.array_equal(MaskBuilder(self.merge).mask(maps), self.merge.mask(maps))

    def test_edges_ask_for_the_photograph_of_the_image_once(self, maps: list[ProbabilityMap]) -> None:
        asked: list[str] = []

        def image(image_id: str) -> NDArray[np.uint8]:
            asked.append(image_id)
            return photograph(6, HEIGHT, WIDTH)

        mask_HW = MaskBuilder(self.merge, ("refine_edges",), image).mask(maps)
        assert asked == ["a"]
        soft = self.merge.margin(maps, 2 * RADIUS)
        margin_HW = soft.margin_HW + guided_filter_residual(
            as_grey(photograph(6, HEIGHT, WIDTH))[soft.box], soft.margin_HW
        )
        clear_HW = soft.ambiguous_HW & (np.abs(margin_HW) > 1e-5)
        assert np.array_equal(mask_HW[soft.box][clear_HW], margin_HW[clear_HW] >= 0)
        with pytest.raises(ValueError, match="edges"):
            MaskBuilder(self.merge, ("refine_edges",)).mask(maps)

    def test_the_order_given_does_not_matter(self, maps: list[ProbabilityMap]) -> None:
        def image(image_id: str) -> NDArray[np.uint8]:
            return photograph(7, HEIGHT, WIDTH)

        edged = MaskBuilder(self.merge, ("refine_edges",), image).mask(maps)
        for steps in permutations(("refine_edges", "keep_largest", "fill_holes")):
            assert np.array_equal(
                MaskBuilder(self.merge, steps, image).mask(maps), fill_small_holes(keep_largest_component(edged))
            )

    @pytest.mark.parametrize("level", [0, 200])
    def test_empty_maps_and_maps_of_the_whole_raster(self, level: int) -> None:
        maps = [ProbabilityMap.crop("a", "v", 1, np.full((HEIGHT, WIDTH), level, np.uint8))]
        merge, even = MergeRule("mean_probability", 0.5, (1,), (1,)), np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        mask_HW = MaskBuilder(merge, ("refine_edges", "keep_largest", "fill_holes"), lambda _: even).mask(maps)
        assert mask_HW.all() if level else not mask_HW.any()

    def test_settings_keep_the_one_order_and_refuse_what_is_no_step(self) -> None:
        assert EnsembleSettings().postprocess == ()
        given = EnsembleSettings(postprocess=("fill_holes", "refine_edges"))
        assert given.postprocess == ("refine_edges", "fill_holes")
        assert build_mask_builder(given, [("a", 0)], 1, lambda _: photograph(0, 9, 9)).steps == (
            "refine_edges",
            "fill_holes",
        )
        for wrong in (("fill_holes", "fill_holes"), ("smooth",)):
            with pytest.raises(ValidationError):
                EnsembleSettings(postprocess=wrong)  # type: ignore[arg-type]


def spoiled(mask_HW: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """Levels as a net at 160 x 256 may give them: its outline wanders by some pixels, and it sees things."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    off_x, off_y = (
        cv2.resize(random.normal(0, 2.5, (24, 36)).astype(np.float32), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        for _ in "xy"
    )
    moved_HW = cv2.remap(mask_HW.astype(np.float32), x + off_x, y + off_y, cv2.INTER_LINEAR)
    small = cv2.resize(cv2.GaussianBlur(moved_HW, (0, 0), 3), (256, 160), interpolation=cv2.INTER_AREA)
    grown_HW = cv2.resize(small, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    grown_HW[40:60, 100:140] = 0.8
    return np.rint(255 * np.clip(1.1 * grown_HW - 0.05, 0, 1)).astype(np.uint8)


def store_of(
    source: CompetitionData, ids: Sequence[str], work: Path, test: bool, truncated: str = ""
) -> PredictionStore:
    def predict(some: Sequence[str]) -> Iterator[tuple[str, NDArray[np.uint8] | CorruptFileError]]:
        for image_id in some:
            levels_HW = spoiled(source.masks.mask(image_id), parse_image_id(image_id)[1])
            yield (
                image_id,
                CorruptFileError("truncated") if image_id == truncated else np.stack([levels_HW, levels_HW // 2 * 2]),
            )

    work.mkdir()
    job = PredictJob(ids, ["identity", "hflip"], 2, test, net="")
    return PredictionStore(write_predictions(job, lambda some: as_maps(job, predict(some)), work))


ALL: tuple[PostStep, ...] = ("refine_edges", "keep_largest", "fill_holes")


@pytest.mark.parametrize("steps", [(), ("keep_largest", "fill_holes"), ALL])
def test_scored_masks_equal_submitted_masks(tiny_sample: Path, tmp_path: Path, steps: tuple[PostStep, ...]) -> None:
    source = CompetitionData(tiny_sample)
    ids, settings = source.masks.ids()[:3], EnsembleSettings(postprocess=steps)
    truncated, *sound = ids[1], ids[0], ids[2]
    asked: list[str] = []

    def image(image_id: str) -> NDArray[np.uint8]:
        asked.append(image_id)
        return source.train.image(image_id)

    test = store_of(source, ids, tmp_path / "test", test=True, truncated=truncated)
    (tmp_path / "work").mkdir()
    decision = build_mask_builder(settings, [("small", 0)], 2, image)
    write_submission([test], decision, lambda _: "1 3", tmp_path / "work", tmp_path / "x.csv.gz")
    sent = {image_id: text for _, image_id, text in read_rows(tmp_path / "x.csv.gz")}
    assert sent[truncated] == "1 3"
    assert sorted(asked) == (sound if "refine_edges" in steps else [])

    oof = store_of(source, sound, tmp_path / "oof", test=False)
    nets = EnsembleContext(
        settings=settings,
        views=["identity", "hflip"],
        models=["small"],
        folds=[0],
        ensemble=[("small", 0)],
        store=lambda split, model, fold: oof,
        image=source.train.image,
    )
    evaluation = Evaluation(nets, source.masks.mask)
    scores = evaluation.score(holdout=False)
    assert sorted(scores.images["image_id"]) == sound
    for row, mask_HW in evaluation.worst_images(scores, 2):
        assert rle.encode(mask_HW) == sent[row.image_id]
        assert confusion_counts(mask_HW, source.masks.mask(row.image_id)).dice == row.dice


def test_each_step_improves_damaged_masks_of_real_cars(real_carvana: Path) -> None:
    source, merge = CompetitionData(real_carvana), MergeRule("mean_probability", 0.5, (1,), (1,))
    ids = source.masks.ids()[5::53]
    dice: dict[str, list[float]] = {name: [] for name in ("none", "refine_edges", "keep_largest")}
    for seed, image_id in enumerate(ids):
        mask_HW = source.masks.mask(image_id)
        maps = [ProbabilityMap.crop(image_id, "identity", 1, spoiled(mask_HW, seed))]
        for name, of_image in dice.items():
            steps = () if name == "none" else (name,)
            decided = MaskBuilder(merge, steps, source.train.image).mask(maps)  # type: ignore[arg-type]
            of_image.append(confusion_counts(decided, mask_HW).dice)
    none = np.array(dice["none"])
    assert np.all(np.array(dice["refine_edges"]) - none > 1e-4)
    assert np.all(np.array(dice["keep_largest"]) - none > 3e-4)


def test_steps_leave_true_masks_nearly_unchanged(real_carvana: Path) -> None:
    masks = CompetitionData(real_carvana).masks
    for image_id in masks.ids()[::20]:
        mask_HW = masks.mask(image_id).view(np.bool_)
        assert confusion_counts(keep_largest_component(mask_HW), mask_HW).dice > 1 - 1e-5
        assert confusion_counts(fill_small_holes(mask_HW), mask_HW).dice > 1 - 5e-4
