"""The whole ablation: every split that can be scored, tried, weighed, and put into tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from pipeline.ensembling.ablation import AblationScores, ScoringGroup, score_settings
from pipeline.ensembling.finishing import PostprocessTrial, score_postprocessing
from pipeline.ensembling.grid import SCORED_SPLITS, AblationSpace, EnsembleConfig, NetId, ScoredSplit
from pipeline.ensembling.postprocess import ImageLoader
from pipeline.ensembling.scoring import MaskLoader
from pipeline.ensembling.verdict import ABLATION_COLUMNS, AblationStatistics, best_settings

_WORTH = ("models", "count", "folds", "dice")
_POSTPROCESS = [*(name for name in ABLATION_COLUMNS if name != "front"), "postprocess"]
_DOUBTS = (
    *("split", "image_id", "car", "angle", "dice", "nets", "disagreement", "suspect"),
    *("top", "left", "height", "width"),
)


@dataclass
class AblationTables:
    """What an ablation found, a table a file of ``reports/``."""

    facts: dict[str, Any] = field(default_factory=dict)
    """Summary of each split, or why it was refused, and what there was to choose from."""
    settings: list[pd.DataFrame] = field(default_factory=lambda: [pd.DataFrame(columns=list(ABLATION_COLUMNS))])
    postprocess: list[pd.DataFrame] = field(default_factory=lambda: [pd.DataFrame(columns=_POSTPROCESS)])
    fold_worth: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(_WORTH)))
    doubts: list[pd.DataFrame] = field(default_factory=lambda: [pd.DataFrame(columns=list(_DOUBTS))])


@dataclass(frozen=True)
class AblationRunner:
    """What is to be compared, and on what."""

    choices: AblationSpace
    held_out: int
    """Cars held out of all folds."""
    panels: Callable[[ScoredSplit], Sequence[ScoringGroup]]
    """Maps of a split, checked."""
    true_mask: MaskLoader
    photo: ImageLoader
    """Asked for by steps that look at photographs."""

    def run(self) -> AblationTables:
        """Score all that can be scored; raises CarvanaError for what was asked for and can't be."""
        refusals = {split: self.choices.why_not_scorable(split, self.held_out) for split in SCORED_SPLITS}
        findings = AblationTables({"choices": self.choices.fingerprint()})
        for split, refusal in refusals.items():
            if refusal:
                findings.facts[split] = {"refused": refusal}
            else:
                self._add(findings, split)
        return findings

    def _add(self, findings: AblationTables, split: ScoredSplit) -> None:
        grid, panels = self.choices.grid(split), self.panels(split)
        subsets = self.choices.fold_subsets() if split == "holdout" else []
        settings = list(dict.fromkeys([*grid, *subsets]))
        trial = score_settings(panels, settings, self.choices.predicted[split], self.true_mask, f"Ablating on {split}")
        verdict = AblationStatistics(
            split,
            replace(trial, settings=grid, dice_SI=trial.dice_SI[: len(grid)]),
            pooled_cost(panels),
            self.choices.ablation.tolerance,
        )
        findings.facts[split] = verdict.summary() | {"cautions": self.choices.warnings(split)}
        findings.settings.append(verdict.table)
        findings.doubts.append(trial.images.assign(split=split, dice=trial.dice_SI[0])[list(_DOUBTS)])
        findings.postprocess.append(self._finished(split, panels, verdict))
        if subsets:
            findings.fold_worth = _fold_worth(trial, subsets)

    def _finished(
        self, split: ScoredSplit, panels: Sequence[ScoringGroup], verdict: AblationStatistics
    ) -> pd.DataFrame:
        """Return the rows of the current and the best settings with each list of steps, as they are now first."""
        ablation, now = self.choices.ablation, self.choices.ensemble.postprocess
        settings = [verdict.trial.settings[0], *best_settings(verdict, ablation.postprocess_best)]
        tried = [PostprocessTrial(setting, steps) for setting in settings for steps in ablation.postprocess]
        if not tried:
            return pd.DataFrame(columns=_POSTPROCESS)
        tried = list(dict.fromkeys([PostprocessTrial(settings[0], now), *tried]))
        trial, extra_s = score_postprocessing(
            panels, verdict.trial, tried, self.true_mask, self.photo, f"Post-processing {split}"
        )
        table = replace(verdict, trial=trial).table.drop(columns="front")
        # Passes do not add to seconds: where nets were not timed, the cost stays theirs.
        table["cost"] += extra_s if table["seconds"].notna().all() else 0
        table["seconds"] += extra_s
        return table.assign(postprocess=[" ".join(f.steps) or "none" for f in tried])


def _fold_worth(trial: AblationScores, subsets: Sequence[EnsembleConfig]) -> pd.DataFrame:
    dice = dict(zip(trial.settings, trial.dice_SI.mean(axis=1).tolist(), strict=True))
    rows = [(row["models"], len(s.folds), row["folds"], dice[s]) for s in subsets for row in [s.row()]]
    return pd.DataFrame(rows, columns=list(_WORTH))


def pooled_cost(panels: Sequence[ScoringGroup]) -> dict[tuple[NetId, str], float]:
    """Return the seconds an image by net and view: the mean over all folds of a model and all views of a size.

    Their nets do the same work, and a flip is nothing beside it: what the clock says of them otherwise is noise, which
    must not decide between settings.
    """
    known = pd.DataFrame(
        [(net, view, net[0], _size(view), seconds) for p in panels for (net, view), seconds in p.seconds().items()],
        columns=["net", "view", "model", "size", "seconds"],
    )
    known["seconds"] = known.groupby(["model", "size"])["seconds"].transform("mean")
    return {(row.net, row.view): float(row.seconds) for row in known.itertuples()}  # type: ignore[misc, arg-type]


def _size(view: str) -> str:
    return view.partition("scale:")[2] or "1"
