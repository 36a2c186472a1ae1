"""How much of a map's displacement is no gradient: the curl share κ of its Jacobian, from a few products with it.

A Lipschitz map is optimal for the quadratic cost only if its Jacobian J is symmetric and positive semidefinite almost
everywhere (Brenier 1991): the curl share asks for the first, `psd_share` for the second. Unlike the optimal transport
score it does not saturate in high dimension. Handed on by `probes`.

| symbol | identifier | meaning |
|---|---|---|
| κ | share | E‖skew J‖² / E‖J − I‖², Frobenius norms, E the mean over points |
| B | rows | directions of the space that is looked at, one a row; M = B Bᵀ |
| A | — | B J Bᵀ: what a probe z meets is A z = B J (Bᵀz) |
| τ | scale | 1, or the common factor whose multiple of the identity comes closest to J |
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from geodesic.networks import Network

Map = Callable[[Tensor], Tensor]

_NUMBERS = {"cpu": 1 << 21, "cuda": 1 << 25}  # of the states that are sent through a map at a time
_RANK = 1e-5  # singular values of a cloud below this share of the largest are its rounding
_STEPS = 16  # of Lanczos
SPACES = ("isotropic", "span", "covariance")


@dataclass(frozen=True)
class Curl:
    """The curl share of a map on a space, and what it has to be read beside."""

    share: float  # κ in [0, 1]; nan where the displacement is rounding alone
    chance: float  # κ of a random matrix on this space: (r − 1) / 2r for r dimensions
    psd_share: float | None  # of the points tried, those where no direction with ⟨v, J v⟩ < 0 was found: an upper bound
    size: float  # √E‖J − τI‖² / ‖I‖: κ means nothing where it goes to 0
    standard_error: float  # of share, over points and probes
    scale: float  # τ


def curl_share(
    map: Map,
    x: Float[Tensor, "n *state"],
    probes: int = 16,
    generator: torch.Generator | None = None,
    directions: Float[Tensor, "rows *direction"] | None = None,
    trace_free: bool = False,
    *,
    psd_points: int = 8,
    psd_steps: int = _STEPS,
) -> Curl:
    """κ = E‖skew J‖² / E‖J − I‖² of a map of R^k into itself: 0 iff its displacement is a gradient (on the points x).

    By Hutchinson's estimator: ‖skew J‖² = ¼ E_v‖Jv − Jᵀv‖², one product with J and one with Jᵀ a probe, probes
    independent from point to point and uniform on a sphere. Where the space has no more dimensions than there are
    probes, its axes are taken and the answer is exact.

    With `directions` B the matrix looked at is A = B J Bᵀ instead of J and M = B Bᵀ instead of I. Orthonormal rows
    give the Jacobian of the map from and to their span, which alone decides optimality where the data fill no more.
    The rows x_i − x̄ of a cloud give A weighed by its covariance, each direction by its variance. B only counts up to
    a rotation of its rows and a common factor. The chance level has r = (tr M)² / tr M² dimensions: all k without
    directions, their number where they are orthonormal, the participation ratio of the variances of a cloud.

    κ is unchanged by translations of input and output and by an orthogonal change of coordinates in both. Cost:
    (probes · n + psd_steps · psd_points) passes with J and as many with Jᵀ, in the memory of one batch.

    Args:
        map: (n, *state) -> (n, *state), each point by itself (a network in evaluation mode), differentiable by
            torch.func.
        x: points at which the Jacobian is taken.
        probes: per point.
        generator: CPU generator of the probes; None takes torch's global one.
        directions: B, one direction a row.
        trace_free: take J − τI for J − I, with the τ that makes it smallest over all points: for a plain network,
            whose output has no scale of its own. Then κ is unchanged by a factor of the map as well.
        psd_points: how many of the points are tried for λ_min(sym J) ≥ 0 (the first ones); 0 leaves it out.
        psd_steps: Lanczos steps for each; the least Ritz value lies above λ_min, so a negative one is proof, to
            rounding, and a positive one is not (unless there are as many steps as dimensions).

    Raises:
        ValueError: for no points, no probes, no direction but 0, directions or images of another shape, or non-finite
            products.
    Source: the divergence-free part of paper eq. (15); Hutchinson 1990.
    """
    _check(len(x), probes, psd_points, psd_steps)
    if directions is not None and directions.shape[1:] != x.shape[1:]:
        raise ValueError(f"directions of shape {tuple(directions.shape[1:])} for states of {tuple(x.shape[1:])}")
    with torch.inference_mode(False), torch.no_grad():
        x = x.clone()  # a tensor made in inference mode cannot be differentiated
        rows = None if directions is None else _flat(directions.clone().to(x), x)
        space = _Space(x, rows)
        z, exact = space.draw(probes, generator)
        found = _curl(_cells(map, x, space, z), space, trace_free, exact)
        psd = _psd_share(map, x[:psd_points], space, psd_steps, generator) if psd_points else None
    return Curl(**found, psd_share=psd)


def curl_of_stages(
    network: Network,
    x: Float[Tensor, "n *shape"],
    probes: int = 8,
    generator: torch.Generator | None = None,
    *,
    points: int | None = None,
    spaces: Sequence[str] = SPACES,
    block_spaces: Sequence[str] = SPACES[:2],
    psd_points: int = 8,
) -> list[dict[str, Any]]:
    """`curl_of_stage` for every stage of a network, at the states of the inputs x, in evaluation mode.

    A plain network has to be brought to a fixed gauge first (`tracks.align`, `networks.regauge`): its Jacobian maps
    units to units that bear no common name.
    """
    was_training = network.training
    network.eval()
    found = []
    with torch.inference_mode(False), torch.no_grad():
        x = x.clone()
        for stage in network.stages:
            x = stage.entry(x)
            found.append(
                curl_of_stage(
                    stage.blocks,
                    x,
                    probes,
                    generator,
                    points=points,
                    spaces=spaces,
                    block_spaces=block_spaces,
                    psd_points=psd_points,
                )
            )
            for block in stage.blocks:
                x = block(x)
    network.train(was_training)
    return found


def curl_of_stage(
    blocks: Iterable[Map],
    x: Float[Tensor, "n *state"],
    probes: int = 8,
    generator: torch.Generator | None = None,
    *,
    points: int | None = None,
    spaces: Sequence[str] = SPACES,
    block_spaces: Sequence[str] = SPACES[:2],
    psd_points: int = 8,
) -> dict[str, Any]:
    """Curl shares of the map x_0 -> x_L of a chain of blocks and of each block, as plain values for a record.

    Spaces: "isotropic" is all of R^k; "span" the span of the differences of the states x at the map's own input, with
    orthonormal directions; "covariance" the same span, each direction by its variance. Of a cloud of fewer points than
    dimensions "span" depends on how many they are: compare it between clouds of one size. A block x + f(x) has J − I =
    Df, so that its share is that of its branch f. All maps meet the same isotropic probes.

    Args:
        blocks: maps (n, *state) -> (n, *state), as for `curl_share`.
        x: the cloud x_0.
        probes: per point.
        generator: CPU generator of the probes.
        points: Jacobians are taken at the first so many; None takes all. The cost follows them, not the cloud.
        spaces: those of the whole map.
        block_spaces: those of each block; all blocks together cost as much as the whole map.
        psd_points: see `curl_share`.

    Returns:
        cloud, points, probes: their numbers; map: for each space the fields of `Curl` and trace_free_share, the share
        once the trace part is taken off (psd_share is None for "covariance", which has the sign of "span"); blocks:
        for each space lists over blocks of share, standard_error, size and trace_free_share. Numbers have four digits;
        None is undefined.

    Raises:
        ValueError: for an unknown space, and what `curl_share` refuses.
    """
    if unknown := sorted({*spaces, *block_spaces} - set(SPACES)):
        raise ValueError(f"space {', '.join(unknown)} is unknown; there are: {', '.join(SPACES)}")
    points = len(x) if points is None else min(points, len(x))
    _check(points, probes, psd_points)
    with torch.inference_mode(False), torch.no_grad():
        x, blocks = x.clone(), tuple(blocks)
        shared = _Space(x[:points], None).draw(probes, generator) if "isotropic" in {*spaces, *block_spaces} else None

        def look(map: Map, cloud: Tensor, names: Sequence[str], tried: int) -> dict[str, dict[str, Any]]:
            found: dict[str, dict[str, Any]] = {}
            rows: dict[str, Tensor | None] = {"isotropic": None}
            if set(names) - {"isotropic"}:
                rows["span"], sizes = _axes(cloud)
                rows["covariance"] = sizes[:, None] * rows["span"]
            for name in names:
                space = _Space(cloud[:points], rows[name])
                z, exact = shared if name == "isotropic" else space.draw(probes, generator)
                cells = _cells(map, cloud[:points], space, z)
                found[name] = _curl(cells, space, False, exact)
                found[name]["trace_free_share"] = _curl(cells, space, True, exact)["share"]
                found[name]["psd_share"] = (
                    _psd_share(map, cloud[:points][:tried], space, _STEPS, generator)
                    if tried and name != "covariance"
                    else None
                )
            return found

        whole = look(lambda state: reduce(lambda s, block: block(s), blocks, state), x, spaces, psd_points)
        each = []
        for block in blocks:
            each.append(look(block, x, block_spaces, 0))
            x = block(x)
    return {
        "cloud": len(x),
        "points": points,
        "probes": probes,
        "map": {name: {key: _digits(value) for key, value in one.items()} for name, one in whole.items()},
        "blocks": {
            name: {
                key: [_digits(one[name][key]) for one in each]
                for key in ("share", "standard_error", "size", "trace_free_share")
            }
            for name in block_spaces
        },
    }


def _check(points: int, probes: int, psd_points: int, psd_steps: int = _STEPS) -> None:
    if points < 1 or probes < 1 or psd_points < 0 or psd_steps < 1:
        raise ValueError(
            f"{points} points, probes={probes}, psd_points={psd_points}, psd_steps={psd_steps}: "
            "pass at least one point, probe and step"
        )


class _Space:
    """The directions that are looked at: all of R^k, or the rows of B."""

    def __init__(self, like: Float[Tensor, "n *state"], rows: Float[Tensor, "m k"] | None):
        self.n, self.like, self.rows = len(like), like, rows
        if rows is None:
            self.dimensions = like[0].numel()
            self.rank = float(self.dimensions)
            self.gram = None
            return
        self.dimensions = len(rows)
        self.gram = rows @ rows.mT
        squares = self.gram.double().square().sum()
        if not squares > 0:
            raise ValueError(f"{len(rows)} directions that are all 0 span nothing; pass differences of distinct points")
        self.rank = (self.gram.double().trace().square() / squares).item()

    def draw(self, probes: int, generator: torch.Generator | None) -> tuple[Float[Tensor, "p n m"], bool]:
        """Probes z with E z zᵀ = I (times a factor), and whether they are all the axes."""
        m = self.dimensions
        if probes >= m:
            return torch.eye(m).to(self.like)[:, None].expand(m, self.n, m), True
        z = torch.randn(probes, self.n, m, generator=generator).to(self.like)
        return z.div_(z.norm(dim=-1, keepdim=True)), False

    def lift(self, z: Float[Tensor, "p n m"]) -> Float[Tensor, "p n k"]:
        """Bᵀz."""
        return z if self.rows is None else z @ self.rows

    def read(self, v: Float[Tensor, "p n k"]) -> Float[Tensor, "p n m"]:
        """B v."""
        return v if self.rows is None else v @ self.rows.mT

    def identity(self, z: Float[Tensor, "p n m"]) -> Float[Tensor, "p n m"]:
        """M z."""
        return z if self.gram is None else z @ self.gram


def _products(
    map: Map, x: Float[Tensor, "n *state"], space: _Space, z: Float[Tensor, "p n m"]
) -> tuple[Float[Tensor, "p n m"], Float[Tensor, "p n m"]]:
    """A z and Aᵀz at every point, all probes in one batch: the states themselves are passed through the map once."""
    v = _shaped(space.lift(z), x)
    push = torch.vmap(lambda one: torch.func.jvp(map, (x,), (one,))[1])(v)
    if push.shape != v.shape:
        raise ValueError(f"the map takes states {tuple(x.shape[1:])} to {tuple(push.shape[2:])}; it must keep them")
    (pull,) = torch.vmap(torch.func.vjp(map, x)[1])(v)
    return space.read(_flat(push, x)), space.read(_flat(pull, x))


def _cells(map: Map, x: Float[Tensor, "n *state"], space: _Space, z: Float[Tensor, "p n m"]) -> Float[Tensor, "4 p n"]:
    """Of each point and probe: ‖skew(A) z‖², ‖e‖², ⟨e, Mz⟩ and ‖Mz‖², with e = sym(A) z − M z the displacement's."""
    points = max(1, _NUMBERS["cpu" if x.device.type == "cpu" else "cuda"] // (len(z) * x[0].numel()))
    parts = []
    for some, probe in zip(x.split(points), z.split(points, 1), strict=True):
        push, pull = _products(map, some, space, probe)
        still = space.identity(probe)
        skew, e, still = (part.double() for part in ((push - pull) / 2, (push + pull) / 2 - still, still))
        squares = [(left * right).sum(-1) for left, right in ((skew, skew), (e, e), (e, still), (still, still))]
        parts.append(torch.stack(squares))
    cells = torch.cat(parts, 2).cpu()
    if bad := int((~cells.isfinite()).any(0).any(0).sum()):
        raise ValueError(f"{bad} of {len(x)} points have non-finite Jacobian products; a diverged network has no κ")
    return cells


def _curl(cells: Float[Tensor, "4 p n"], space: _Space, trace_free: bool, exact: bool) -> dict[str, float]:
    """The fields of `Curl` but psd_share; its standard error is a jackknife over points, or probes of a single one."""
    units = cells.sum(1) if cells.shape[2] > 1 else cells[..., 0]

    def ratio(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        skew, sym, cross, still = sums
        shift = cross / still if trace_free else torch.zeros_like(cross)  # τ − 1
        total = skew + sym - 2 * shift * cross + shift.square() * still
        noise = (8 * torch.finfo(space.like.dtype).eps) ** 2 * still * (1 + shift.abs()).square()
        return torch.where(total > noise, skew / total, torch.nan), (total.clamp_min(0) / still).sqrt(), 1 + shift

    total, count = units.sum(-1), units.shape[1]
    share, size, scale = (value.item() for value in ratio(total))
    if cells.shape[2] == 1 and exact:
        error = 0.0
    elif count < 2:
        error = float("nan")
    else:
        without, _, _ = ratio(total[:, None] - units)
        error = ((count - 1) / count * (without - without.mean()).square().sum()).sqrt().item()
    chance = (space.rank - 1) / (2 * space.rank)
    return {"share": share, "chance": chance, "size": size, "standard_error": error, "scale": scale}


def _psd_share(
    map: Map, x: Float[Tensor, "n *state"], space: _Space, steps: int, generator: torch.Generator | None
) -> float:
    """Share of points with no negative Ritz value of sym A, from Lanczos with full reorthogonalisation, all at once."""
    m = space.dimensions
    steps = min(steps, m)
    q = torch.randn(len(x), m, generator=generator).to(x)
    q = q / q.norm(dim=-1, keepdim=True)
    basis = q.new_zeros(len(x), steps, m)
    triangle = torch.zeros(len(x), steps, steps, dtype=torch.float64)
    eps = torch.finfo(x.dtype).eps
    largest = q.new_zeros(len(x))
    for step in range(steps):
        basis[:, step] = q
        push, pull = _products(map, x, space, q[None])
        w = ((push + pull) / 2)[0]
        alpha = (q * w).sum(-1)
        largest = torch.maximum(largest, w.norm(dim=-1))
        for _ in range(2):  # once leaves rounding that grows from step to step
            w = w - (basis.mT @ (basis @ w[..., None]))[..., 0]
        beta = w.norm(dim=-1)
        # Of a space that is used up only rounding is left: a vector 0 adds Ritz values 0, which change no sign.
        beta = torch.where(beta > 100 * eps * largest, beta, 0)
        q = torch.where(beta[:, None] > 0, w / beta[:, None], 0)
        triangle[:, step, step] = alpha.double().cpu()
        if step + 1 < steps:
            triangle[:, step, step + 1] = triangle[:, step + 1, step] = beta.double().cpu()
    ritz = torch.linalg.eigvalsh(triangle)
    return (ritz[:, 0] >= -1000 * eps * ritz.abs().amax(-1)).double().mean().item()


def _axes(x: Float[Tensor, "n *state"]) -> tuple[Float[Tensor, "m k"], Float[Tensor, "m"]]:
    """Principal axes of a cloud as rows, and its standard deviations along them, by the n × n Gram matrix."""
    centred = _flat(x, x).double()
    centred = centred - centred.mean(0)
    squares, u = torch.linalg.eigh(centred @ centred.mT)
    sizes = squares.clamp_min(0).sqrt()
    keep = sizes > _RANK * sizes[-1]
    if not keep.any():
        raise ValueError(f"the {len(x)} points are one point: they span nothing; pass distinct ones")
    axes = (u[:, keep].mT @ centred) / sizes[keep, None]
    return axes.to(x), (sizes[keep] / len(x) ** 0.5).to(x)


def _innermost(x: Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _flat(x: Float[Tensor, "..."], like: Tensor) -> Float[Tensor, "..."]:
    """Coordinates in the order in which `like` has them in memory."""
    return (x.movedim(-3, -1) if _innermost(like) else x).flatten(1 - like.ndim)


def _shaped(flat: Float[Tensor, "... k"], like: Tensor) -> Float[Tensor, "..."]:
    """The states of such coordinates."""
    if not _innermost(like):
        return flat.unflatten(-1, like.shape[1:])
    _, c, h, w = like.shape
    return flat.unflatten(-1, (h, w, c)).movedim(-1, -3)


def _digits(value: float | None) -> float | None:
    return None if value is None or value != value else float(f"{value:.4g}")
