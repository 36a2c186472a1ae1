"""What decides a run's numbers, checked and complete."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from geodesic import data, networks
from geodesic.training import Recipe, _setting

LABELS = ("true", "shuffled")
_LEARNING_RATE, _TOY_LEARNING_RATE = 0.05, 0.003  # a planar state is a narrow passage: large steps blow it up
_OTS_POINTS = (1000, 2000, 4000)
_SMALL_OTS_POINTS = {"digits": (90, 180, 360), **dict.fromkeys(data.TOYS, (250, 500, 1000))}


@dataclass(frozen=True, kw_only=True)
class Settings(Recipe):
    """Everything that decides a run's numbers; its hash names the record. Every field says what it is in metadata."""

    learning_rate: float | None = _setting(  # pyright: ignore[reportIncompatibleVariableOverride] (a number when made)
        None, "peak step size of SGD; None takes 0.05, or 0.003 for planar clouds"
    )
    dataset: str = _setting("digits", f"data set: {', '.join(data.NAMES)}")
    network: str = _setting("resnet", f"architecture: {', '.join(networks.NETWORKS)}")
    norm: str = _setting("none", f"normalisation: {', '.join(networks.NORMS)}")
    stages: int = _setting(1, "K, constant-dimension stages")
    depth: int | None = _setting(None, "L, blocks a stage; None takes the paper's")
    width: int | None = _setting(None, "units, or channels of the first stage; None takes the paper's")
    seed: int = _setting(0, "of the initial weights, the order of the points and shuffled labels")
    labels: str = _setting("true", f"training labels: {', '.join(LABELS)} (a control)")
    n_train: int | None = _setting(None, "training points used; None takes all")
    n_test: int | None = _setting(None, "test points used; None takes all")
    eval_points: int = _setting(2000, "points of each part scored after every epoch; test points disturbed at the end")
    ots_points: tuple[int, ...] | None = _setting(
        None,
        "sizes of the nested subsets for the transport score, of each part as far as it goes; "
        "None takes 1000 2000 4000, or what a small set has",
    )
    plane_points: int = _setting(
        30, "training points whose tracks are kept in a plane; of seed 0 at up to eight epochs"
    )

    def __post_init__(self) -> None:
        # One run, one hash: what was left open is filled in; 0 and 0.0, or another order of subsets, are the same.
        if self.learning_rate is None:
            object.__setattr__(
                self, "learning_rate", _TOY_LEARNING_RATE if self.dataset in data.TOYS else _LEARNING_RATE
            )
        points = _SMALL_OTS_POINTS.get(self.dataset, _OTS_POINTS) if self.ots_points is None else self.ots_points
        object.__setattr__(self, "ots_points", tuple(sorted(points)))
        for name in ("weight_decay", "learning_rate", "momentum"):
            object.__setattr__(self, name, float(getattr(self, name)))
        super().__post_init__()
        for name, choices in (("network", networks.NETWORKS), ("norm", networks.NORMS), ("labels", LABELS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}")
        for name in ("eval_points", "plane_points"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 2")
        if any(n < 2 for n in points):
            raise ValueError(f"ots_points={self.ots_points} must each be at least 2")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(self)
        return values | {"ots_points": list(values["ots_points"])}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """Settings from JSON values, where a tuple is a list.

        Raises:
            ValueError: for a field that does not exist.
        """
        known = [f.name for f in fields(cls)]
        if unknown := sorted(values.keys() - set(known)):
            raise ValueError(f"unknown setting {', '.join(unknown)}; there are: {', '.join(known)}")
        points = values.get("ots_points")
        values = values | {"ots_points": None if points is None else tuple(points)}
        return cls(**values)
