"""Any network seen at its blocks: the states of a batch, found by forward hooks, in the stages that they form.

A block that keeps the shape of its input adds a state to the track; any other opens a stage. A network of our own is
read without hooks; both answer `read(x) -> (stages, output)`. Used by `measure`.

| symbol | identifier | meaning |
|---|---|---|
| x_0 … x_L | states | of a stage: what its first block met or made, and what each further block made of it |
"""

import difflib
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

View = str | Callable[[Tensor], Tensor] | None

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {  # of tokens (n, tokens, units)
    "mean": lambda tokens: tokens.mean(1),
    "first": lambda tokens: tokens[:, 0],
    "last": lambda tokens: tokens[:, -1],
    "all": lambda tokens: tokens.flatten(0, 1),
}
_NEAREST = 5  # names that are offered for one that is not there


@runtime_checkable
class Reader(Protocol):
    """Whatever gives the states of a batch, stage by stage, and its output, from one pass."""

    def read(self, x: Any, /) -> tuple[list[list[Tensor]], Any]:
        """Per stage the states x_0 … x_L, each (n, *state); and what the network makes of the batch."""
        ...

    def __call__(self, x: Any, /) -> Any:
        """The output alone."""
        ...


@dataclass(frozen=True)
class Stage:
    """A run of blocks that keep the shape of the state."""

    blocks: tuple[str, ...]  # that move the state, by name
    shape: tuple[int, ...]  # of a state


def watch(model: nn.Module, blocks: str | Sequence[str] = "layer?.*", view: View = None) -> "Watched":
    """See any model at its blocks.

    Args:
        model: takes a tensor, a tuple of arguments or a mapping of named ones, points on axis 0 of each. Wrappers for
            several devices and compiled models are unwrapped.
        blocks: names as `model.named_modules()` has them, or patterns: `*` and `?` stand for anything but a dot.
        view: what of a block's output (its first tensor) is the state. None takes it whole. Of tokens
            (n, tokens, units): "mean" over all positions, padding included; "first" or "last" position; "all", each
            token a point. Or a function of the tensor.

    Raises:
        TypeError: for what is no module, or a scripted one, whose blocks call no hooks.
        ValueError: for a pattern that no block has, blocks inside one another, or an unknown view.
    """
    return Watched(model, blocks, view)


class Watched:
    """A model and the blocks at which it is seen. `stages` and `notes` say what the passes so far have found."""

    def __init__(self, model: nn.Module, blocks: str | Sequence[str], view: View = None):
        self.model = _unwrapped(model)
        self.blocks = _find(self.model, [blocks] if isinstance(blocks, str) else list(blocks))
        if isinstance(view, str) and view not in VIEWS:
            raise ValueError(f"view={view!r} is unknown; pass {', '.join(map(repr, VIEWS))}, a function or None")
        self.view = view
        self.stages: tuple[Stage, ...] = ()
        self.notes: list[str] = []
        self._rest: dict[str, tuple[Any, ...] | None] = {}  # what a block takes besides the state

    def read(self, x: Any) -> tuple[list[list[Tensor]], Any]:
        """The states of a batch, stage by stage, and the model's output, in evaluation mode and without gradients.

        Hooks are removed and modes and random state restored whatever happens. A stage that no block follows has no
        track and is left out.

        Raises:
            ValueError: if a block runs twice or never, gives no tensor with the points on axis 0, or non-finite
                states; if no block keeps the shape of its input; or if the states are of other shapes than before.
        """
        walk = _Walk(self, points(x))
        with undisturbed(self.model), _hooked(self.blocks, walk.before, walk.after):
            output = call(self.model, x)
        stages = walk.finish()
        self._note("something that is not watched stands between these, and a new stage opens: ", walk.gaps)
        self._note("outputs changed in place, of which the state before is kept: ", walk.changes)
        self._settle(tuple(stage for stage in walk.found() if stage.blocks))
        self._rest = walk.rest
        return stages, output

    def __call__(self, x: Any) -> Any:
        """The model's output, in evaluation mode and without gradients."""
        with undisturbed(self.model):
            return call(self.model, x)

    def identity_maps(self, x: Any) -> dict[str, bool]:
        """Which blocks carry their input on past their weights, as a residual block does, and which are plain.

        A block whose matrices and kernels are 0 still tells the points apart if an identity map leads around them.
        Blocks that have none are left out, for they say nothing. The points of x must differ.
        """
        found: dict[str, bool] = {}
        asking = False

        def before(name: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal asking
            zeros = {key: torch.zeros_like(p) for key, p in block.named_parameters() if p.ndim > 1}
            if asking or not zeros:
                return
            asking = True  # the same hooks hang on the block that is asked
            out = _tensor(torch.func.functional_call(block, zeros, *_mapped(torch.clone, (args, kwargs))))
            asking = False
            found[name] = out is not None and bool((out - out[:1]).abs().max() > 1e-6 * out.abs().max())

        with undisturbed(self.model), _hooked(self.blocks, before):
            call(self.model, x)
        return found

    def maps(self, stage: int) -> list[Callable[[Tensor], Tensor]]:
        """The blocks of a stage as maps of its states; call them in `undisturbed(self.model)`.

        Raises:
            ValueError: where the state is but a view of what a block takes, or a block takes other tensors besides.
        """
        if self.view is not None:
            raise ValueError(f"with view={self.view!r} a block is no map of its states")
        return [self._map(name) for name in self.stages[stage].blocks]

    def _map(self, name: str) -> Callable[[Tensor], Tensor]:
        block, rest = self.blocks[name], self._rest[name]
        if rest is None or _tensor(rest) is not None:
            raise ValueError(f"block {name} takes more than the state")
        key, args, kwargs = rest

        def run(state: Tensor) -> Tensor:
            state = state.clone()  # the block may change it in place
            return _made(name, block(*args, **kwargs, **{key: state}) if key else block(state, *args, **kwargs))

        return run

    def _note(self, what: str, where: Sequence[str]) -> None:
        if where and (note := what + _listed(where)) not in self.notes:
            self.notes.append(note)

    def _settle(self, found: tuple[Stage, ...]) -> None:
        """The first batch says which stages there are; every other has to agree."""
        if not found:
            raise ValueError(
                f"none of the {len(self.blocks)} blocks ({_listed(self.blocks)}) keeps the shape of its input: "
                "there is no track to score; name blocks that do"
            )
        self.stages = self.stages or found
        if found == self.stages:
            return
        for old, new in zip(self.stages, found, strict=False):
            if old.blocks == new.blocks and old.shape != new.shape:
                raise ValueError(
                    f"the states of {old.blocks[0]} have shape {new.shape} in this batch and {old.shape} before; "
                    "bring all inputs to one shape, or take a view of one"
                )
        raise ValueError("this batch runs other blocks, or in another order, than the one before; watch fixed ones")


class _Walk:
    """The states of one pass, as the hooks meet them."""

    def __init__(self, watched: Watched, n: int):
        self.watched, self.n = watched, n
        self.stages: list[list[Tensor]] = []
        self.names: list[list[str]] = []  # of the blocks that made the states of a stage, without the first state's
        self.order: list[tuple[str, Tensor]] = []  # (where, whether all is finite), in the order of the pass
        self.rest: dict[str, tuple[Any, ...] | None] = {}
        self.gaps: list[str] = []
        self.changes: list[str] = []
        self._last: tuple[str, Tensor, int] | None = None  # block, its output, how often that had been written to
        self._met: Tensor | None = None  # state that opens a stage if the block keeps its shape
        self._shape: torch.Size | None = None

    def before(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in self.rest:
            raise ValueError(f"block {name} runs more than once in a pass; watch blocks that run once")
        changed = self._changed(f"before {name} reads it")
        x = _tensor(args)
        x = _tensor(kwargs) if x is None else x
        if x is None:
            raise ValueError(f"block {name} takes no tensor; watch blocks from state to state")
        self.rest[name] = _besides(x, args, kwargs)
        same = self._last is not None and self._last[1] is x and not changed
        met = self.stages[-1][-1] if same else self._state(f"the input of block {name}", x)
        self._shape = met.shape
        if same or (self.stages and _equal(met, self.stages[-1][-1])):
            self._met = None
            return
        self._met = met.clone()
        if self._last is not None and met.shape == self.stages[-1][-1].shape:
            self.gaps.append(f"{self._last[0]} and {name}")

    def after(self, name: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._changed(f"by {name}")
        out = _made(name, output)
        state = self._state(f"block {name}", out).clone()
        if state.shape != self._shape:
            self.stages.append([state])
            self.names.append([])
        else:
            if self._met is not None:
                self._add_finite(f"the input of block {name}", self._met)
                self.stages.append([self._met])
                self.names.append([])
            self.stages[-1].append(state)
            self.names[-1].append(name)
        self._add_finite(f"block {name}", state)
        self._last, self._met = (name, out, _version(out)), None

    def finish(self) -> list[list[Tensor]]:
        """The tracks of the pass."""
        if missing := [name for name in self.watched.blocks if name not in self.rest]:
            raise ValueError(f"of the blocks, {_listed(missing)} did not run in the pass; watch those that do")
        finite = torch.stack([flag for _, flag in self.order]).tolist()
        if not all(finite):
            where = self.order[finite.index(False)][0]
            raise ValueError(f"non-finite states, {where} being the first with some; look at its weights and the input")
        self._changed("later in the pass")
        return [states for states, names in zip(self.stages, self.names, strict=True) if names]

    def found(self) -> list[Stage]:
        """The stages, those without a track included."""
        return [
            Stage(tuple(names), tuple(states[0].shape[1:]))
            for names, states in zip(self.names, self.stages, strict=True)
        ]

    def _state(self, where: str, x: Tensor) -> Tensor:
        if not x.is_floating_point() or not x.ndim or len(x) != self.n:
            raise ValueError(
                f"{where} is {x.dtype} of shape {tuple(x.shape)} for {self.n} points; a state has numbers, the points "
                "on axis 0"
            )
        view = self.watched.view
        if view is None:
            return x
        if callable(view):
            state = view(x)
        elif x.ndim == 3:
            state = VIEWS[view](x)
        else:
            raise ValueError(f"view={view!r} is one of tokens (n, tokens, units); {where} has shape {tuple(x.shape)}")
        if not isinstance(state, Tensor) or state.ndim < 2:
            raise ValueError(f"the view of {where} is no tensor (n, *state); return one")
        return state

    def _add_finite(self, where: str, state: Tensor) -> None:
        self.order.append((where, state.isfinite().all()))

    def _changed(self, who: str) -> bool:
        """Whether the last block's output has been written to since; it is noted once."""
        if self._last is None:
            return False
        name, out, version = self._last
        if _version(out) == version:
            return False
        self.changes.append(f"{name} {who}")
        self._last = (name, out, _version(out))
        return True


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode and the random state are put back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    # Tensors made in inference mode do not count how often they were written to.
    with torch.random.fork_rng(devices=cuda), torch.inference_mode(False), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def call(model: nn.Module, x: Any) -> Any:
    """The model's output for a batch: a tensor, a tuple of arguments or a mapping of named ones."""
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple | list) else model(x)


def points(x: Any) -> int:
    """How many points a batch has.

    Raises:
        TypeError: for a batch without a tensor.
    """
    first = _tensor(x)
    if first is None or not first.ndim:
        raise TypeError(f"a batch of {type(x).__name__} holds no tensor of points; pass tensors, tuples or mappings")
    return len(first)


def placed(x: Any, model: nn.Module) -> Any:
    """A batch on the model's device, its floating-point numbers in the model's precision."""
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None:
        return x
    return _mapped(lambda t: t.to(like.device, like.dtype if t.is_floating_point() else None), x)


@contextmanager
def _hooked(
    blocks: Mapping[str, nn.Module], before: Callable[..., None], after: Callable[..., None] | None = None
) -> Iterator[None]:
    """Let `before` and `after` be told of every block that runs."""
    handles = []
    try:
        for name, block in blocks.items():
            handles.append(block.register_forward_pre_hook(partial(before, name), with_kwargs=True))
            if after is not None:
                handles.append(block.register_forward_hook(partial(after, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unwrapped(model: Any) -> nn.Module:
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _unwrapped(model.module)
    if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # of torch.compile
        return _unwrapped(inner)
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model is a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("the blocks of a scripted model call no hooks; pass the module that it was scripted from")
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise TypeError("the model was compiled in place, and its blocks may call no hooks; pass it before .compile()")
    return model


def _find(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The blocks that the patterns name, in the order of the model."""
    modules = {name: module for name, module in model.named_modules() if name}
    chosen: set[str] = set()
    for pattern in patterns:
        matched = {name for name in modules if _matches(name, pattern)}
        if not matched:
            near = difflib.get_close_matches(pattern, modules, _NEAREST, 0)
            raise ValueError(f"no block is named {pattern!r}; the nearest names are: {', '.join(near) or 'none'}")
        chosen |= matched
    for name in sorted(chosen):
        if inside := next((other for other in chosen if name.startswith(f"{other}.")), None):
            raise ValueError(f"block {name} lies in block {inside}; watch one of the two")
    return {name: module for name, module in modules.items() if name in chosen}


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _tensor(value: Any) -> Tensor | None:
    """The first tensor of nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return None
    return next((found for item in value if (found := _tensor(item)) is not None), None)


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nesting with every tensor passed through a function."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _mapped(function, item) for key, item in value.items()}
    return type(value)(_mapped(function, item) for item in value) if type(value) in (tuple, list) else value


def _made(name: str, output: Any) -> Tensor:
    """The first tensor that a block gives."""
    if (out := _tensor(output)) is None:
        raise ValueError(f"block {name} gives {type(output).__name__} without a tensor; watch blocks that give one")
    return out


def _besides(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """(name of the state's argument or None, other arguments, other named ones); None if the state lies deeper."""
    if args and args[0] is x:
        return None, args[1:], kwargs
    key = next((key for key, value in kwargs.items() if value is x), None)
    if key is None:
        return None
    return key, args, {other: value for other, value in kwargs.items() if other != key}


def _equal(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _listed(names: Any) -> str:
    names = list(names)
    return ", ".join(names) if len(names) < 5 else f"{', '.join(names[:3])} … {names[-1]}"
