"""The files that stage ablate writes, as a run might have left them, without a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, combinations
from math import exp
from typing import Any

import numpy as np
import pandas as pd

VIEWS = ("identity", "hflip", "scale:0.75")
THRESHOLDS = (0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7)
SKILL = {"small": 0.0052, "resnet18": 0.0041, "resnet34": 0.0038}
SECONDS = {"small": 0.05, "resnet18": 0.31, "resnet34": 0.55}


def subsets(items: Sequence[Any]) -> list[tuple[Any, ...]]:
    return list(chain.from_iterable(combinations(items, size) for size in range(1, len(items) + 1)))


@dataclass(frozen=True)
class FakeReports:
    """A run of these models and folds; fewer than 8 cars have no intervals, no held-out car refuses that split."""

    models: tuple[str, ...] = ("small", "resnet18")
    folds: tuple[int, ...] = (0, 1, 2)
    cars: tuple[str, ...] = tuple(f"{number:012x}" for number in range(14))
    held_out: tuple[str, ...] = tuple(f"{number:012x}" for number in range(100, 110))
    seconds: bool = True

    def settings(self) -> pd.DataFrame:
        """ablation.csv."""
        return pd.concat([self._settings(split) for split in self._splits()], ignore_index=True)

    def postprocess(self) -> pd.DataFrame:
        """postprocess.csv."""
        parts = []
        for split in self._splits():
            rows = self._settings(split)
            for _, row in pd.concat([rows[rows["current"]], rows.nlargest(2, "dice")]).iterrows():
                for number, name in enumerate(("none", "keep_largest", "fill_holes", "edges largest")):
                    better = (0.0, 0.00004, 0.00001, -0.0003)[number]
                    changed = row["difference"] + better
                    whole = {
                        "dice": row["dice"] + better,
                        "difference": changed,
                        "current": bool(row["current"]) and not number,
                        "seconds": row["seconds"] + 0.01 * number if self.seconds else None,
                        "cost": row["cost"] + (0.01 * number if self.seconds else 0),
                    }
                    bounds = {"low": changed - 0.00003, "high": changed + 0.00002} if self._sure(split) else {}
                    parts.append(row.to_dict() | whole | bounds | {"postprocess": name, "better": 9, "worse": 3})
        return pd.DataFrame(parts).drop(columns="front")

    def fold_subsets(self) -> pd.DataFrame:
        """fold_subsets.csv."""
        rows = [
            {
                "models": model,
                "count": len(folds),
                "folds": " ".join(map(str, folds)),
                "dice": self._dice((model,), folds, VIEWS[:2]),
            }
            for model in self.models
            for folds in subsets(self.folds)
            if len(self.held_out) > 1
        ]
        return pd.DataFrame(rows, columns=["models", "count", "folds", "dice"])

    def disagreement(self) -> pd.DataFrame:
        """image_disagreement.csv."""
        return self._seen().query("split in @splits", local_dict={"splits": self._splits()})

    def images(self) -> pd.DataFrame:
        """images.csv: every model out of fold, and what the nets come to when merged."""
        seen = self._seen()[["split", "image_id", "car", "angle", "dice"]].assign(fold=0, iou=0.99, accuracy=0.998)
        oof = seen[seen["split"] == "oof"]
        each = [oof.assign(model=model, dice=oof["dice"] - 0.001) for model in self.models]
        merged = [seen.assign(model="ensemble")]
        whole = pd.concat([*each, *merged], ignore_index=True)
        if len(self.models) > 1:
            return whole
        return whole[(whole["split"] == "holdout") | (whole["model"] != "ensemble")]

    def _seen(self) -> pd.DataFrame:
        random = np.random.default_rng(1)
        rows = []
        for split in ("oof", "holdout"):
            for car in self._cars(split):
                level = random.normal(0, 0.001)
                for angle in range(1, 17):
                    dice = 0.9955 + level - abs(random.normal(0, 0.0015)) - (0.002 if angle in (1, 9) else 0)
                    nets = len(self.models) * (1 if split == "oof" else len(self.folds))
                    row = {"split": split, "image_id": f"{car}_{angle:02d}", "car": car, "angle": angle, "dice": dice}
                    box = {"suspect": 0, "top": 0, "left": 0, "height": 0, "width": 0}
                    differ = int(random.integers(500, 9000)) if nets > 1 else None
                    rows.append(row | {"nets": nets, "disagreement": differ} | box)
        return pd.DataFrame(rows)

    def summary(self) -> dict[str, Any]:
        """ablation.json."""
        whole: dict[str, Any] = {"oof": self._summary("oof")}
        refused = "1 car is held out: set folds.holdout_cars to 2 or more, and run 'dvc repro'."
        return whole | {"holdout": self._summary("holdout") if len(self.held_out) > 1 else {"skipped": refused}}

    def curves(self, epochs: int = 16) -> pd.DataFrame:
        """curves.csv."""
        random = np.random.default_rng(2)
        rows = []
        for model in self.models:
            for fold in self.folds:
                for epoch in range(1, epochs + 1):
                    dice = 1 - SKILL[model] - 0.08 * exp(-epoch / 3) + random.normal(0, 0.0004)
                    loss = 0.02 + 0.9 * exp(-epoch / 3) + abs(random.normal(0, 0.004))
                    seen = dice if epoch % 4 == 0 else None
                    rows.append({"net": f"{model}/{fold}", "epoch": epoch, "lr": 0.01, "loss": loss, "dice": seen})
        return pd.DataFrame(rows)

    def _splits(self) -> list[str]:
        return ["oof", "holdout"] if len(self.held_out) > 1 else ["oof"]

    def _cars(self, split: str) -> Sequence[str]:
        return self.cars if split == "oof" else self.held_out

    def _sure(self, split: str) -> bool:
        return len(self._cars(split)) >= 8

    def _dice(
        self,
        models: Sequence[str],
        folds: Sequence[int],
        views: Sequence[str],
        threshold: float = 0.5,
        merge: str = "mean_logit",
    ) -> float:
        error = 1 / sum(1 / SKILL[model] for model in models) * len(models) ** 0.85
        error *= (max(1, len(folds)) ** -0.12) * (len(views) ** -0.05)
        error += (
            0.04 * (threshold - 0.46) ** 2
            + {"mean_logit": 0.0, "mean_probability": 0.00006, "majority_vote": 0.00022}[merge]
        )
        name = "".join([*models, *map(str, folds), *views])
        return 1 - error + 0.0001 * np.sin(sum(map(ord, name)))

    @cache  # noqa: B019 - few, and as long as the tests run
    def _settings(self, split: str) -> pd.DataFrame:
        rows = [
            self._row(split, models, folds, views, merge, threshold)
            for models in subsets(self.models)
            for folds in ([()] if split == "oof" else subsets(self.folds))
            for views in subsets(VIEWS)
            for merge in (
                ("mean_probability", "mean_logit", "majority_vote")
                if len(models) * max(1, len(folds)) > 1
                else ("mean_probability",)
            )
            for threshold in THRESHOLDS
        ]
        table = pd.DataFrame(rows)
        now = table.loc[table["current"], "dice"].item()
        table["difference"] = table["dice"] - now
        spread = 0.00004 + 0.3 * table["difference"].abs()
        for name, side in (("low", -1), ("high", 1)):
            table[name] = (
                (table["difference"] + side * spread).where(~table["current"], 0) if self._sure(split) else None
            )
        table["better"] = (
            (16 * len(self._cars(split)) * (0.5 + 300 * table["difference"]).clip(0, 1)).round().astype(int)
        )
        table["worse"] = 16 * len(self._cars(split)) - table["better"]
        table.loc[table["current"], ["better", "worse"]] = 0
        cost = table["seconds" if self.seconds else "passes"]
        table["cost"] = cost
        table["front"] = [
            not ((cost <= c) & (table["dice"] > d)).any() for c, d in zip(cost, table["dice"], strict=True)
        ]
        return table

    def _row(
        self,
        split: str,
        models: Sequence[str],
        folds: Sequence[int],
        views: Sequence[str],
        merge: str,
        threshold: float,
    ) -> dict[str, Any]:
        whole = len(models) == len(self.models) and (split == "oof" or len(folds) == len(self.folds))
        nets = max(1, len(folds))
        only_merge = len(models) * nets == 1
        return {
            "split": split,
            "models": " ".join(models),
            "folds": " ".join(map(str, folds)),
            "views": " ".join(views),
            "merge": merge,
            "weights": "",
            "threshold": threshold,
            "current": whole and views == VIEWS[:2] and threshold == 0.5 and merge == "mean_probability",
            "dice": self._dice(models, folds, views, threshold, "mean_logit" if only_merge else merge),
            "images": 16 * len(self._cars(split)),
            "cars": len(self._cars(split)),
            "passes": len(models) * nets * len(views),
            "seconds": sum(SECONDS[model] for model in models) * nets * len(views) if self.seconds else None,
            "disk_bytes": 39_000 * len(models) * nets * len(views),
            "kind": "models" if len(models) > 1 else "folds" if nets > 1 else "single net",
        }

    def _summary(self, split: str) -> dict[str, Any]:
        rows, sure = self._settings(split), self._sure(split)
        current, best = rows[rows["current"]].iloc[0], rows.loc[rows["dice"].idxmax()]
        near = rows[rows["dice"] > best["dice"] - 0.0003]
        nested = float(best["dice"]) - 0.00011
        cheapest = plain(near.loc[near["passes"].idxmin()])
        advice = "+0.00020 (95 % CI +0.00010 to +0.00030) vs. the current setting, at 14% of its cost."
        return {
            "cars": len(self._cars(split)),
            "images": 16 * len(self._cars(split)),
            "settings": len(rows),
            "no_interval": None if sure else "Fewer than 8 cars: no interval can be trusted, so that none is shown.",
            "current": {
                "dice": float(current["dice"]),
                "low": float(current["dice"]) - 0.0009 if sure else None,
                "high": float(current["dice"]) + 0.0006 if sure else None,
            },
            "best": plain(best),
            "confidence_set_size": len(near) if sure else None,
            "cheapest": cheapest | {"loss": 0.0002, "loss_at_most": 0.0004} if sure else None,
            "recommended": cheapest if sure else None,
            "reason": advice if sure else None,
            "warnings": ["The nets were chosen by these very images."] if split == "oof" else [],
            "nested_selection": {
                "groups": min(10, len(self._cars(split))),
                "best_dice": float(best["dice"]),
                "nested_dice": nested,
                "difference": nested - float(current["dice"]),
            },
        }


def plain(row: "pd.Series[Any]") -> dict[str, Any]:
    """A row as JSON holds it."""
    values = {name: value.item() if isinstance(value, np.generic) else value for name, value in row.items()}
    return {
        str(name): None if isinstance(value, float) and np.isnan(value) else value for name, value in values.items()
    }
