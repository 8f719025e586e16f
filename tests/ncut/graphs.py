"""Graphs for the kernels: seeded random families, and structured ones whose λ2 is multiple.

A family returns bool (B, N, N) symmetric edges. Most are made the way images make them: tokens on a
grid, joined where they are alike. Only products of tokens count, so that tokens lie in the space
of their few independent directions.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from microclip_deploy.bench.kernel.tokens import grid_side, smooth_noise, unit, voronoi
from microclip_deploy.ncut.spec import NCutSpec

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]
Generator = np.random.Generator
Family = Callable[[Generator, int, int], Bools]

TAU = NCutSpec().tau
CHANNELS = 32
"""Independent directions of a token besides those that are shared."""


# ------------------------------------------------------------------------------ tokens on a grid


def two_clusters(rng: Generator, batch: int, count: int) -> Bools:
    """Join tokens of an ellipse and of the rest around it, with any contrast."""
    inside = ellipses(rng, batch, count)[:, :, None]
    common, contrast = (
        np.sqrt(_uniform(rng, batch, 0, 0.6)),
        np.sqrt(_uniform(rng, batch, 0.1, 0.7)),
    )
    noise = _uniform(rng, batch, 0.3, 0.9) / math.sqrt(CHANNELS)
    own = noise * _noise(rng, batch, count, 0.5, 1.0)
    ones = np.ones((batch, count, 1), np.float32)
    tokens = np.concatenate([common * ones, contrast * inside, contrast * ~inside, own], axis=2)
    return joined(unit(tokens))


def segments(rng: Generator, batch: int, count: int) -> Bools:
    """Join tokens of the cells of a Voronoi diagram that have a direction in common."""
    tokens = segment_tokens(rng, batch, count)
    common = np.sqrt(_uniform(rng, batch, 0, 0.7)) * np.ones((batch, count, 1), np.float32)
    return joined(unit(np.concatenate([common, tokens], axis=2)))


def fields(rng: Generator, batch: int, count: int) -> Bools:
    """Join tokens whose channels are 1/f noise, as the statistics of photos are."""
    channels = int(rng.integers(6, CHANNELS + 1))
    decay = rng.uniform(0.8, 1.8, batch)
    common = _uniform(rng, batch, 0, 0.4 * math.sqrt(channels))
    tokens = smooth_noise(rng, batch, count, channels, decay)
    ones = np.ones((batch, count, 1), np.float32)
    return joined(unit(np.concatenate([common * ones, tokens], axis=2)))


def layer_norm(rng: Generator, batch: int, count: int) -> Bools:
    """Join raw tokens of a LayerNorm by their products: the default affinity."""
    return joined(layer_norm_tokens(rng, batch, count, 64))


def short_tokens(rng: Generator, batch: int, count: int) -> Bools:
    """Make a few tokens so short that they have no edge, not even to themselves."""
    tokens = layer_norm_tokens(rng, batch, count, 64)
    short = rng.random((batch, count)) < rng.choice([0.01, 0.05, 0.3], (batch, 1))
    tokens[short] *= 1e-3
    return joined(tokens)


def neighbours(rng: Generator, batch: int, count: int) -> Bools:
    """Join every token with those most like it."""
    tokens = unit(segment_tokens(rng, batch, count))
    likeness = tokens @ tokens.transpose(0, 2, 1)
    most = np.minimum(rng.integers(4, max(5, count // 8), batch), count - 1)
    ranked = -np.sort(-likeness, axis=2)
    level = np.take_along_axis(ranked, most[:, None, None], axis=2)
    near = likeness >= level
    return _symmetric(near)


def discs(rng: Generator, batch: int, count: int) -> Bools:
    """Join points of a jittered grid that are near one another."""
    side, y, x = _grid(count)
    jitter = rng.uniform(0, 0.35, (batch, 1))
    y, x = (at + jitter * rng.standard_normal((batch, count)) for at in (y, x))
    radius = rng.uniform(1.2, max(1.3, 0.35 * side), (batch, 1, 1))
    down, across = y[:, :, None] - y[:, None], x[:, :, None] - x[:, None]
    return np.asarray(down * down + across * across <= radius * radius)


# ------------------------------------------------------------------------------ drawn edges


def components(rng: Generator, batch: int, count: int) -> Bools:
    """Draw 2 to 5 noisy dense blocks, some tokens joined to themselves alone."""
    part = rng.integers(0, rng.integers(2, 6, (batch, 1)), (batch, count))
    lone = rng.random((batch, count)) < rng.choice([0, 0.01, 0.05], (batch, 1))
    density = np.take_along_axis(np.sqrt(rng.uniform(0.3, 1, (batch, 5))), part, axis=1)
    same = part[:, :, None] == part[:, None]
    edges = same & (_draws(rng, batch, count) < density[:, :, None] * density[:, None])
    return _looped(edges & ~lone[:, :, None] & ~lone[:, None])


def near_complete(rng: Generator, batch: int, count: int) -> Bools:
    """Join all pairs but some of a few tokens, and a few others."""
    order = rng.permuted(np.broadcast_to(np.arange(count), (batch, count)), axis=1)
    poor = order < rng.integers(1, max(2, count // 10), (batch, 1))
    share = poor * rng.uniform(0.02, 0.9, (batch, count))
    missing = _draws(rng, batch, count) < np.maximum(share[:, :, None], share[:, None])
    missing |= _draws(rng, batch, count) < rng.choice([0, 0.002, 0.02], (batch, 1, 1))
    return _looped(~missing)


def weak_links(rng: Generator, batch: int, count: int) -> Bools:
    """Join two dense groups by few edges: λ2 is small, though far above eps."""
    inside = ellipses(rng, batch, count)
    same = inside[:, :, None] == inside[:, None]
    edges = same & (_draws(rng, batch, count) < rng.uniform(0.3, 0.95, (batch, 1, 1)))
    crossing = (~same).sum(axis=(1, 2)) / 2
    wanted = rng.integers(1, max(2, count // 4), batch) / np.maximum(crossing, 1)
    edges |= ~same & (_draws(rng, batch, count) < wanted[:, None, None])
    return _looped(edges)


def sparse(rng: Generator, batch: int, count: int) -> Bools:
    """Draw edges at random, so few that the graph may fall apart."""
    degree = rng.uniform(2, 8, (batch, 1, 1))
    return _looped(_draws(rng, batch, count) < degree / count)


FAMILIES: dict[str, Family] = {
    "two clusters": two_clusters,
    "segments": segments,
    "1/f fields": fields,
    "LayerNorm": layer_norm,
    "short tokens": short_tokens,
    "neighbours": neighbours,
    "discs": discs,
    "components": components,
    "near complete": near_complete,
    "weak links": weak_links,
    "sparse": sparse,
}


# ------------------------------------------------------------------------------ structured graphs


def multiple_graphs(count: int) -> dict[str, Bools]:
    """Return graphs (N, N) whose second eigenvalue is multiple, exactly and by symmetry."""
    side = math.isqrt(count)
    graphs = {
        "complete without a matching": _without(count, _groups(count, 2, count // 2)),
        "complete without two edges": _without(count, _groups(count, 2, 2)),
        "complete without triangles": _without(count, _groups(count, 3, count // 3)),
        "complete without a triangle": _without(count, _groups(count, 3, 1)),
        "star": _hub(count),
        "cycle": _circulant(count, (1,)),
        "circulant of 2": _circulant(count, (1, 2)),
        "circulant of a fifth": _circulant(count, tuple(range(1, max(2, count // 5)))),
        "bipartite": _bipartite(count, count // 3),
        "bipartite without loops": _bipartite(count, count // 3) & ~np.eye(count, dtype=bool),
        "three equal cliques": _groups(count, count // 3, 3) | np.eye(count, dtype=bool),
    }
    if count == side * side and side > 2:
        graphs["torus"] = _torus(side)
    if count & (count - 1) == 0:
        graphs["hypercube"] = _hypercube(count)
    if parts := next((k for k in range(3, 17) if count % k == 0 and count > 2 * k), None):
        graphs["ring of cliques"] = _ring_of_cliques(count, parts)
    if count < 12:  # too small for three groups, or for a ring that is not complete
        graphs = {name: edges for name, edges in graphs.items() if name in ("star",)}
    return graphs


def tied_graphs(count: int) -> dict[str, Bools]:
    """Return graphs (N, N) with a simple λ2 whose vector has two opposite peaks."""
    half = count // 2
    halves = _groups(count, half, 2)
    graphs = {
        "complete without an edge": _without(count, _groups(count, 2, 1)),
        "two equal cliques": halves | np.eye(count, dtype=bool),
    }
    if count % 2 == 0:
        graphs["barbell"] = halves.copy()
        graphs["barbell"][[half - 1, half], [half, half - 1]] = True
    return graphs


def shuffled(edges: Bools, order: NDArray[np.intp]) -> Bools:
    """Return graphs (..., N, N) with their tokens in another order."""
    return np.ascontiguousarray(edges[..., order, :][..., order])


def _without(count: int, removed: Bools) -> Bools:
    return ~removed | np.eye(count, dtype=bool)


def _groups(count: int, size: int, groups: int) -> Bools:
    """Return groups of tokens, all pairs of a group joined; later tokens have no edges."""
    number = np.arange(count) // size
    return np.asarray((number[:, None] == number) & (number < groups))


def _hub(count: int) -> Bools:
    edges = np.eye(count, dtype=bool)
    edges[0] = edges[:, 0] = True
    return edges


def _circulant(count: int, steps: tuple[int, ...]) -> Bools:
    index = np.arange(count)
    apart = (index[:, None] - index) % count
    return np.isin(np.minimum(apart, count - apart), (0, *steps))


def _bipartite(count: int, left: int) -> Bools:
    side = np.arange(count) < left
    return np.asarray((side[:, None] != side) | np.eye(count, dtype=bool))


def _torus(side: int) -> Bools:
    ring, still = _circulant(side, (1,)), np.eye(side, dtype=bool)
    return np.asarray(np.kron(ring, still) | np.kron(still, ring))


def _hypercube(count: int) -> Bools:
    index = np.arange(count)
    differ = index[:, None] ^ index
    return np.asarray(differ & (differ - 1) == 0)


def _ring_of_cliques(count: int, parts: int) -> Bools:
    """Join equal cliques in a cycle, the last token of each with the first of the next."""
    size = count // parts
    edges = _groups(count, size, parts)
    last = np.arange(size - 1, count, size)
    first = (last + 1) % count
    edges[last, first] = edges[first, last] = True
    return edges


# ------------------------------------------------------------------------------ tokens


def joined(tokens: Floats) -> Bools:
    """Join tokens (B, N, D) whose product is above tau."""
    return _symmetric(tokens @ tokens.transpose(0, 2, 1) > TAU)


def segment_tokens(rng: Generator, batch: int, count: int) -> Floats:
    """Return tokens (B, N, CHANNELS) around the prototypes of 3 to 12 Voronoi cells."""
    cells = voronoi(rng, batch, count)
    related = unit(_normal(rng, batch, 12, 8)) @ _normal(rng, batch, 8, CHANNELS)
    prototypes = np.take_along_axis(unit(related), cells[:, :, None], axis=1)
    strength = _uniform(rng, batch, 0.2, 0.8) / math.sqrt(CHANNELS)
    return np.asarray(prototypes + strength * _noise(rng, batch, count, 0.6, 1.2))


def layer_norm_tokens(rng: Generator, batch: int, count: int, width: int) -> Floats:
    """Return raw tokens float32 (B, N, width) as a LayerNorm with gains leaves them."""
    tokens = segment_tokens(rng, batch, count) @ _normal(rng, CHANNELS, width)
    tokens = unit(tokens - tokens.mean(axis=1, keepdims=True))
    share = _uniform(rng, batch, 0, 0.6)
    tokens = np.sqrt(share) * unit(_normal(rng, batch, 1, width)) + np.sqrt(1 - share) * tokens
    tokens -= tokens.mean(axis=2, keepdims=True)
    gains = rng.lognormal(0, 0.25, width).astype(np.float32)
    return np.asarray(tokens / tokens.std(axis=2, keepdims=True) * gains)


def bright_tokens(batch: int = 1, count: int = 196, width: int = 768) -> Floats:
    """Return raw tokens of mean 0.5, exact in every type, whose sum float16 cannot hold.

    Two groups that have nothing in common; the graph is a clique of 49 tokens and one of the rest.
    """
    group = np.arange(count) < count // 4
    half = np.arange(width) < width // 2
    alike = group[:, None] == half[None, :]
    return np.repeat(alike[None], batch, axis=0).astype(np.float32)


def ellipses(rng: Generator, batch: int, count: int) -> Bools:
    """Return the tokens (B, N) of a grid that lie in one ellipse an image."""
    side, y, x = _grid(count)
    top, left = rng.uniform(0.25, 0.75, (2, batch, 1)) * side
    long, short = rng.uniform(0.12, 0.42, (2, batch, 1)) * side
    angle = rng.uniform(0, np.pi, (batch, 1))
    along = (x - left) * np.cos(angle) + (y - top) * np.sin(angle)
    across = (y - top) * np.cos(angle) - (x - left) * np.sin(angle)
    return np.asarray((along / long) ** 2 + (across / short) ** 2 < 1)


def _noise(rng: Generator, batch: int, count: int, smooth: float, decay: float) -> Floats:
    """Return smooth and white noise (B, N, CHANNELS)."""
    steady = np.full(batch, decay)
    white = _normal(rng, batch, count, CHANNELS)
    return np.asarray(
        np.float32(smooth) * smooth_noise(rng, batch, count, CHANNELS, steady) + white
    )


def _grid(count: int) -> tuple[int, Any, Any]:
    """Return side, rows and columns of the square grid whose first cells are the tokens."""
    side = grid_side(count)
    y, x = np.divmod(np.arange(count), side)
    return side, y, x


def _uniform(rng: Generator, batch: int, low: float, high: float) -> Floats:
    return rng.uniform(low, high, (batch, 1, 1)).astype(np.float32)


def _normal(rng: Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape, np.float32)


def _draws(rng: Generator, batch: int, count: int) -> Floats:
    """Return one number in [0, 1) a pair, (B, N, N), symmetric."""
    lower = np.tril(rng.random((batch, count, count), np.float32))
    return np.asarray(np.maximum(lower, lower.transpose(0, 2, 1)))


def _symmetric(edges: Bools) -> Bools:
    return edges | edges.transpose(0, 2, 1)


def _looped(edges: Bools) -> Bools:
    return edges | np.eye(edges.shape[1], dtype=bool)
