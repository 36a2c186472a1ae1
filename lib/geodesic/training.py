"""Train networks by SGD with momentum and weight decay λ, resumable between epochs.

λ is torch's `weight_decay`: the loss carries (λ/2) Σ‖W‖² over weight matrices and kernels; biases and normalisation
parameters are decayed only where `decay="all"` asks for it. The whole data set stays on the network's device; nothing
synchronises inside an epoch. On a CUDA device a step is one captured graph, and several networks can be trained side
by side. Source: arXiv:2102.09235, eqs 13–14 (its optimiser is not known).
"""

import contextlib
import gc
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from geodesic import checkpoints
from geodesic.data import Dataset
from geodesic.networks import Network

SCHEDULES = ("onecycle", "cosine", "constant")
PRECISIONS = ("float32", "bfloat16")
AUGMENTS = ("none", "crop", "crop-flip")
DECAYS = ("weights", "all")
_SAVE_EVERY = 10  # seconds between checkpoints: of a quick run not every epoch is worth one
_TURNS = 32  # steps that every network takes before a further one may begin
_WARM_STEPS = 3  # before a graph is recorded
_WARM_UP = 0.2  # share of the steps in which the one-cycle schedule rises


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. Every field's metadata["help"] says what it is."""

    weight_decay: float = _setting(0.0, "λ: the loss carries (λ/2)·Σ‖W‖²")
    decay: str = _setting("weights", "what λ acts on: weights (matrices and kernels), or all (torch's default)")
    epochs: int = _setting(6, "passes over the training set; 0 leaves the network untrained")
    batch_size: int = _setting(256, "points per step; an incomplete last batch is left out")
    learning_rate: float = _setting(0.05, "peak step size of SGD")
    momentum: float = _setting(0.9, "heavy-ball momentum, in [0, 1)")
    schedule: str = _setting("onecycle", f"course of the step size: {', '.join(SCHEDULES)}")
    augment: str = _setting("none", f"random changes of training images: {', '.join(AUGMENTS)}")
    precision: str = _setting(
        "float32",
        f"of the matrix products in training: {', '.join(PRECISIONS)} (slow on a processor that has no such products)",
    )

    def __post_init__(self) -> None:
        for name, ok, rule in (
            ("weight_decay", math.isfinite(self.weight_decay) and self.weight_decay >= 0, "finite and at least 0"),
            ("epochs", self.epochs >= 0, "at least 0"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("learning_rate", math.isfinite(self.learning_rate) and self.learning_rate > 0, "finite and above 0"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("decay", self.decay in DECAYS, f"one of {', '.join(DECAYS)}"),
            ("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("augment", self.augment in AUGMENTS, f"one of {', '.join(AUGMENTS)}"),
            ("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
        ):
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {rule}")


class DivergedError(RuntimeError):
    """The loss of an epoch is finite, but what the network now makes of its data is not."""


@dataclass
class Progress:
    """What a training run has done so far; all of it is in the checkpoint."""

    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)  # what on_epoch returned, from epoch 0 (untrained)
    snapshots: dict[str, Tensor] = field(default_factory=dict)  # tensors that on_epoch wants to keep
    diverged: bool = False  # a non-finite training loss: the run was stopped

    def finished(self, recipe: Recipe) -> bool:
        """Whether nothing is left to do of a recipe."""
        return self.diverged or self.epoch >= recipe.epochs


@dataclass(frozen=True)
class Job:
    """A network to train and all that belongs to it; see `train` for the fields."""

    network: Network
    dataset: Dataset
    recipe: Recipe
    generator: torch.Generator
    on_epoch: Callable[[Progress], dict[str, Any]] | None = None
    checkpoint: Path | None = None


def train(
    network: Network,
    dataset: Dataset,
    recipe: Recipe,
    *,
    generator: torch.Generator,
    on_epoch: Callable[[Progress], dict[str, Any]] | None = None,
    checkpoint: Path | None = None,
    stop: Callable[[], bool] | None = None,
    show: bool = False,
) -> Progress:
    """Train in place and return the history.

    Args:
        network: on the device where it is to be trained; `dataset` must be on the same.
        dataset: its training set is used.
        recipe: step sizes, λ, epochs, precision.
        generator: CPU generator of the order of the points and the augmentation.
        on_epoch: called before the first epoch and after each; what it returns (JSON) goes into the history; it may
            raise DivergedError, which ends the run as a non-finite loss does. To the
            entry of an epoch is added what training itself has seen: `running` (mean loss and accuracy over the
            augmented batches, each before its step) and `turn` (angle in radians by which a decayed weight turned in
            the epoch's last step, mean over weights).
        checkpoint: file to continue from if it exists, and to write after an epoch; the caller names it after the
            settings, so that it never meets another run's.
        stop: asked after every epoch; where it says True, training ends there with its checkpoint written.
        show: draw a progress bar.

    Raises:
        ValueError: if a batch is larger than the training set.
    """
    job = Job(network, dataset, recipe, generator, on_epoch, checkpoint)
    _, progress = next(train_many([job], stop=stop, show=show), (job, Progress()))
    return progress


def train_many(
    jobs: Iterable[Job], *, together: int = 1, stop: Callable[[], bool] | None = None, show: bool = False
) -> Iterator[tuple[Job, Progress]]:
    """Train several networks, each as `train` would, and yield each when it is done.

    On a CUDA device a small network leaves most of the device idle. Up to `together` networks then take their steps
    in turn, each on a stream of its own, where the device runs them side by side; as soon as one is done the next
    job takes its place. They may differ in everything. On a CPU they are trained one after another.

    Args:
        jobs: may be made one by one, as places become free.
        together: networks under way at a time on a CUDA device.
        stop: see `train`; no further job is begun after it has said True.
        show: draw a progress bar for each.

    Raises:
        ValueError: if a batch is larger than the training set.
    """
    stop = stop or (lambda: False)
    waiting = iter(jobs)
    places: list[_Place] = []
    free: list[_Place] = []
    while True:
        # One at a time, some steps apart: when one ends its epoch and is scored, the others keep the device busy.
        if (free or len(places) < together) and not stop() and (job := next(waiting, None)) is not None:
            if not free:
                places.append(_Place())
                free.append(places[-1])
            free.pop().take(job, stop, show)
        busy = [place for place in places if place.job is not None]
        if not busy:
            return
        for _ in range(_TURNS):
            for place in busy:
                if place.job is not None and (progress := place.go_on()) is not None:
                    job, place.job = place.job, None
                    free.append(place)
                    yield job, progress


def check_batch(recipe: Recipe, dataset: Dataset) -> None:
    """Refuse a batch that the training set cannot fill.

    Raises:
        ValueError: if there is one.
    """
    n = len(dataset.y_train)
    if recipe.epochs and recipe.batch_size > n:
        raise ValueError(f"batch_size={recipe.batch_size} is larger than the training set of {n} points; lower it")


class _Place:
    """Where one network after another is trained: a stream, on a CUDA device."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self.stream: torch.cuda.Stream | None = None

    def take(self, job: Job, stop: Callable[[], bool], show: bool) -> None:
        """Begin with a job."""
        self.job = job
        device = job.dataset.y_train.device
        if device.type == "cuda" and self.stream is None:
            self.stream = torch.cuda.Stream(device)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))  # the network has been made there
            # Graphs of jobs that are done hold memory until it is asked for.
            if 2 * torch.cuda.memory_reserved(device) > torch.cuda.get_device_properties(device).total_memory:
                torch.cuda.empty_cache()
        self.course = _course(job, stop, show)

    def go_on(self) -> Progress | None:
        """One more step, or one more look whether the device has ended an epoch; the progress if that was all."""
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            try:
                next(self.course)
            except StopIteration as end:
                if self.stream is not None:
                    self.stream.synchronize()  # whoever reads the network next may do so on another stream
                return end.value
        return None


def _course(job: Job, stop: Callable[[], bool], show: bool) -> Generator[None, None, Progress]:
    """All of a job's training, as a generator that pauses after every step."""
    recipe = job.recipe
    check_batch(recipe, job.dataset)
    optimiser = _optimiser(job.network, recipe)
    about = asdict(recipe) | {"points": len(job.dataset.y_train)}
    identity = checkpoints.identity(job.dataset.fingerprint, about, job.dataset.y_train.device)
    progress = _restore(job, optimiser, identity)
    if not progress.history and job.on_epoch:
        progress.history.append(job.on_epoch(progress))
    if progress.finished(recipe):
        return progress
    step = _Step(job, optimiser)
    saved = time.monotonic()
    with tqdm(total=recipe.epochs, initial=progress.epoch, desc="epochs", disable=not show, leave=False) as bar:
        while not progress.finished(recipe):
            job.network.train()
            step.draw(progress.epoch)
            for _ in range(step.count):
                step()
                yield
            yield from step.settle()
            seen = step.seen()
            progress.epoch += 1
            progress.diverged = not math.isfinite(seen["running"]["loss"])
            if progress.diverged:
                break
            bar.update()
            bar.set_postfix(loss=f"{seen['running']['loss']:.4f}")
            if job.on_epoch:
                try:
                    progress.history.append(job.on_epoch(progress) | seen)
                except DivergedError:
                    progress.diverged = True
                    break
            over = progress.finished(recipe) or stop()
            if over or time.monotonic() - saved > _SAVE_EVERY:
                momenta = _momenta(job.network, optimiser)
                checkpoints.save(job.checkpoint, job.network, momenta, job.generator, progress, identity)
                saved = time.monotonic()
            if over:
                break
    return progress


class _Step:
    """One step of SGD; on a CUDA device it is captured once as a graph, and a call costs one launch.

    Whatever differs from step to step lies in tensors with an axis of steps, which the graph reads at `at`, and which
    are filled before every epoch: the host need not be asked in between.
    """

    def __init__(self, job: Job, optimiser: torch.optim.SGD) -> None:
        self.job, self.optimiser = job, optimiser
        recipe, y = job.recipe, job.dataset.y_train
        self.count = len(y) // recipe.batch_size
        self.device = y.device
        self.parameters = [p for p in job.network.parameters() if p.requires_grad]  # a frozen one has no gradient
        self.at = torch.zeros(1, dtype=torch.int64, device=y.device)
        self.loss, self.correct = torch.zeros((), device=y.device), torch.zeros((), device=y.device)
        self.rates = torch.zeros(self.count, device=y.device)
        self.drawn = _Drawn.of(self.count, recipe, job.dataset, torch.Generator())
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0
        self.before: list[Tensor] = []
        if self.device.type == "cuda":
            self.rate = torch.zeros((), device=y.device)
            for group in optimiser.param_groups:
                group["lr"] = self.rate
            self.drawn = _Drawn(*(None if part is None else part.to(y.device) for part in self.drawn))
            self._capture()

    def draw(self, epoch: int) -> None:
        """Fill in the order of the points, their augmentation and the step sizes of an epoch."""
        recipe = self.job.recipe
        drawn = _Drawn.of(self.count, recipe, self.job.dataset, self.job.generator)
        rates = [
            recipe.learning_rate * schedule(recipe.schedule, (epoch + step / self.count) / recipe.epochs)
            for step in range(self.count)
        ]
        self.host_rates, self.calls = rates, 0
        if self.graph is None:
            self.drawn = drawn
        else:
            for mine, new in zip(self.drawn, drawn, strict=True):
                if mine is not None:
                    mine.copy_(new)
            self.rates.copy_(torch.tensor(rates))
        for tensor in (self.at, self.loss, self.correct):
            tensor.zero_()

    def __call__(self) -> None:
        """Take the next step."""
        last = self.calls == self.count - 1
        if last:
            self.before = [p.detach().clone() for p in self.job.network.weights()]
        if self.graph is None:
            for group in self.optimiser.param_groups:
                group["lr"] = self.host_rates[self.calls]
            self._body()
        else:
            self.graph.replay()
        self.calls += 1

    def settle(self) -> Iterator[None]:
        """Pause until the device has done all steps."""
        if self.graph is not None:
            done = torch.cuda.Event()
            done.record()
            while not done.query():
                yield

    def seen(self) -> dict[str, Any]:
        """What the steps of an epoch have seen; see `train`."""
        turns = [_angle(a, b) for a, b in zip(self.before, self.job.network.weights(), strict=True)]
        self.before = []
        found = torch.stack([self.loss.double(), self.correct.double(), torch.stack(turns).mean()])
        loss, correct, turn = found.tolist()
        points = self.count * self.job.recipe.batch_size
        return {"running": {"loss": loss / self.count, "accuracy": correct / points}, "turn": turn}

    def _body(self) -> None:
        recipe, dataset, network = self.job.recipe, self.job.dataset, self.job.network
        order, shift, flip = (None if part is None else part.index_select(0, self.at)[0] for part in self.drawn)
        batch, y = dataset.x_train[order], dataset.y_train[order]
        if shift is not None:
            batch = augment(batch, shift, flip)
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16", cache_enabled=False
        ):
            logits = network(batch)
            loss = F.cross_entropy(logits, y)
        for p, gradient in zip(self.parameters, torch.autograd.grad(loss, self.parameters), strict=True):
            p.grad = gradient
        if self.device.type == "cuda":
            self.rate.copy_(self.rates.index_select(0, self.at)[0])
        self.optimiser.step()
        with torch.no_grad():
            self.loss += loss
            self.correct += (logits.argmax(1) == y).sum()
            self.at += 1

    def _capture(self) -> None:
        """Record the step as a graph. The steps that warm the device up are taken back."""
        momenta = [self.optimiser.state[p]["momentum_buffer"] for p in self.parameters]
        states = [*self.parameters, *self.job.network.buffers(), *momenta]
        self.job.network.train()
        collecting = gc.isenabled()
        with torch.no_grad():
            kept = [state.clone() for state in states]
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            for _ in range(_WARM_STEPS):
                self._body()
                self.at.zero_()
            self.graph = torch.cuda.CUDAGraph()
            gc.disable()  # what it would free may not be freed while a graph is recorded
            try:
                self.graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._body()
                finally:
                    self.graph.capture_end()
            finally:
                if collecting:
                    gc.enable()
        with torch.no_grad():
            for state, value in zip(states, kept, strict=True):
                state.copy_(value)


class _Drawn(NamedTuple):
    """What is random in the steps of an epoch; the first axis is that of steps."""

    order: Int64[Tensor, "steps batch"]
    shift: Int64[Tensor, "steps 2 batch"] | None  # rows and columns, see `augment`
    flip: Bool[Tensor, "steps batch"] | None

    @classmethod
    def of(cls, steps: int, recipe: Recipe, dataset: Dataset, generator: torch.Generator) -> "_Drawn":
        """Drawn on the host, so that every device sees the same."""
        size = (steps, recipe.batch_size)
        order = torch.randperm(len(dataset.y_train), generator=generator)[: steps * recipe.batch_size].view(size)
        shift = flip = None
        if recipe.augment != "none":
            pad = padding(dataset.in_shape)
            shift = torch.randint(0, 2 * pad + 1, (steps, 2, recipe.batch_size), generator=generator)
        if recipe.augment == "crop-flip":
            flip = torch.rand(size, generator=generator) < 0.5
        return cls(order, shift, flip)


def _optimiser(network: Network, recipe: Recipe) -> torch.optim.SGD:
    decayed = network.weights() if recipe.decay == "weights" else list(network.parameters())
    ids = {id(p) for p in decayed}
    others = [p for p in network.parameters() if id(p) not in ids]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, fused=True)
    for p in network.parameters():
        optimiser.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimiser


def _angle(a: Tensor, b: Tensor) -> Float64[Tensor, ""]:
    """Angle in radians between two weights as vectors; the form that is exact for small ones."""
    u, v = (w.detach().double() / w.detach().double().norm().clamp_min(1e-300) for w in (a, b))
    return 2 * ((u - v).norm() / 2).clamp_max(1).asin()


def schedule(name: str, t: float) -> float:
    """Step size over its peak at time t in [0, 1): a linear rise then a half cosine, the half cosine alone, or 1."""
    if name == "constant":
        return 1.0
    if name == "onecycle" and t < _WARM_UP:
        return (t + 1e-3) / (_WARM_UP + 1e-3)  # the first step is small, not zero
    start = _WARM_UP if name == "onecycle" else 0.0
    return 0.5 * (1 + math.cos(math.pi * (t - start) / (1 - start)))


def padding(in_shape: tuple[int, ...]) -> int:
    """By how many pixels an image of this shape may be shifted: an eighth of its height, at least one."""
    return max(1, in_shape[1] // 8)


def augment(
    x: Float[Tensor, "n c h w"], shift: Int64[Tensor, "2 n"], flip: Bool[Tensor, "n"] | None = None
) -> Float[Tensor, "n c h w"]:
    """Shift every image, edges filled with 0, and mirror some.

    Args:
        x: images.
        shift: first row and column of each image that are seen of it once `padding` zeros stand on every side.
        flip: which images are mirrored left to right; None mirrors none.
    """
    n, _, height, width = x.shape
    pad = padding(tuple(x.shape[1:]))
    rows = shift[0, :, None] + torch.arange(height, device=x.device)
    columns = shift[1, :, None] + torch.arange(width, device=x.device)
    if flip is not None:
        columns = torch.where(flip[:, None], columns.flip(1), columns)
    points = torch.arange(n, device=x.device)[:, None, None]
    padded = F.pad(x, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    return padded[points, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _restore(job: Job, optimiser: torch.optim.SGD, identity: dict[str, str]) -> Progress:
    """Put a job back where its checkpoint left it, or at its beginning."""
    saved = checkpoints.restore(job.checkpoint, job.network, job.generator, identity)
    if saved is None:
        return Progress()
    momenta = _momenta(job.network, optimiser)
    for name, value in saved.optimiser.items():
        momenta[name].copy_(value)
    return Progress(saved.epoch, saved.history, saved.snapshots)


def _momenta(network: Network, optimiser: torch.optim.SGD) -> dict[str, Tensor]:
    """Heavy-ball momenta by the name of their parameter."""
    return {name: optimiser.state[p]["momentum_buffer"] for name, p in network.named_parameters()}
