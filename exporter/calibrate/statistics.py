"""Statistics of every matrix on the calibration text, collected layer by layer and kept in the cache.

A small change D of a matrix W with inputs x changes its outputs by D x. It changes the model's next-token distributions
by a KL divergence of about 1/2 E[(g^T D x)^2] per token. Here g is the gradient, at those outputs, of the
log-likelihood of tokens drawn from the model itself (the Fisher information is the Hessian of the KL: Martens 2020,
section 9). If outputs are treated as independent and their squared gradients share one pattern over the tokens (Kim et
al. 2025, GuidedQuant, eq. 8), then

    KL = 1/2 sum_i s_i (D H D^T)_ii,    s_i = E[g_i^2],    H = E[w x x^T],    w = |g|^2 / E|g|^2,

so a row's error is weighted by its sensitivity s_i, and a token by its weight w. Rows of a table are weighted by how
often they are looked up.

Gradients are those of the whole model, also where layers attend to keys and values of earlier ones
(`exporter.calibrate.carried_keys`) and have inputs that follow from the embedding (`LayerStream.table_gradients`).

The model runs forwards once, storing every layer's inputs on disk, then backwards from the head to the embedding.
"""

import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from exporter.calibrate.bf16_matmul import quick_products
from exporter.calibrate.carried_keys import state_width, widest_state
from exporter.calibrate.layer_stream import (
    LayerInputs,
    LayerStream,
    LoadedLayer,
    Outputs,
    Progress,
    as_windows,
    capped,
    check_finite,
    first_output,
)
from exporter.calibrate.ranges import (
    HEAD_OUTPUT,
    ChannelRanges,
    load_ranges,
    observed_ranges,
    output_place,
    save_head_ranges,
)
from exporter.calibrate.second_moments import Moments, Site, load_power, load_site
from exporter.calibrate.windows import Windows
from exporter.formats.format import Float32
from exporter.foundation.cache import cache_folder, locked, require_space
from exporter.foundation.cache_entries import (
    ARRAY,
    VECTORS,
    DamagedEntryError,
    Filling,
    filling,
    is_whole,
    load,
    require_whole,
    save,
)
from exporter.model import blocks
from exporter.model.decoder import HEAD_SITE, TOKENS
from exporter.model.model import Model

VERSION = 7
# Written after all other files.
LAST = "lookups.npz"
POSITIONS_AT_ONCE = 512
NO_SPACE = "free some space or name another folder in EDGE_EXPORTER_CACHE"


class Statistics:
    """Statistics by site and matrix, and ranges by place, read lazily from a cache folder.

    A site is where the input of one or more matrices is observed: `layers.3.mlp_in`, `head_in`. The embedding's
    input is the token itself, so an untied embedding has none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last: tuple[str, Site | None] | None = None

    @property
    def key(self) -> str:
        """A digest of model, text and seed."""
        return self._folder.name

    def site(self, name: str) -> Site | None:
        """Return the statistics of a site, caching the last one read; None if it was not observed."""
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self.read_site(name)
        return self._last[1]

    def read_site(self, name: str) -> Site | None:
        """Return the statistics of a site without caching them."""
        return load_site(self._folder, name)

    def power(self, site: str) -> Float32 | None:
        """Return E[x^2] of every column with tokens weighted, float32 [columns]; None as for `site`."""
        return load_power(self._folder, site)

    def importance(self, site: str) -> Float32 | None:
        """Return E[x^2] of every column with equal token weights, float32 [columns]; None as for `site`."""
        path = self._folder / f"{site}.npz"
        return load(path, VECTORS)["squares"] if path.is_file() else None

    def sensitivity(self, layer: int | None, part: str) -> Float32:
        """Return E[g^2] of each output of a matrix over all tokens, float32 [rows]; the head has no layer.

        It is zero for tokens that do not reach an expert.
        """
        return load(self._folder / f"{_gradients(layer)}.npz", VECTORS)[part]

    def lookups(self, table: str = "embedding") -> tuple[Float32, Float32]:
        """Return how often each row of a table is looked up, and how sensitive its columns are.

        Args:
            table: The role of the table.

        Returns:
            The frequency of each token, float32 [vocab], and E[g^2] of the rows looked up, [columns].
        """
        found = load(self._folder / LAST, VECTORS)
        return found["tokens"], found[table]

    def ranges(self, place: str) -> ChannelRanges | None:
        """Return the ranges of a site or of an `exporter.calibrate.ranges.output_place`; None if not observed."""
        return load_ranges(self._folder, place)


def _gradients(layer: int | None) -> str:
    return "head.gradients" if layer is None else f"layers.{layer}.gradients"


def statistics_key(model: Model, windows: Windows, seed: int) -> str:
    """Return the cache key of the statistics of a model on a text."""
    return hashlib.sha256(f"{VERSION}:{model.digest}:{windows.digest}:{seed}".encode()).hexdigest()[:32]


def site_columns(model: Model) -> dict[str, int]:
    """Return the width of each observed site."""
    return {group.site: group.columns for group in model.groups() if group.site != TOKENS}


def disk_bytes(model: Model, tokens: int) -> int:
    """Return the disk space needed to collect the statistics: moments, every layer's inputs, gradients."""
    shape = model.decoder
    states = sum(state_width(shape, layer) for layer in range(shape.layers + 1))
    channels = states + 2 * widest_state(shape) + shape.layers * shape.layer_input_width
    return 4 * (sum(columns**2 for columns in site_columns(model).values()) + tokens * channels)


def collect(model: Model, windows: Windows, seed: int, progress: Progress) -> Statistics:
    """Return the statistics of a model on one text; see `collect_together`."""
    return collect_together(model, [windows], seed, progress)[0]


@quick_products()
def collect_together(model: Model, texts: Sequence[Windows], seed: int, progress: Progress) -> list[Statistics]:
    """Run the float model forwards and backwards over texts, with one layer's weights in memory at a time.

    Each layer is loaded once forwards and once backwards, for all texts. An interrupted run resumes after the last
    finished layer.

    Args:
        model: The model.
        texts: Such as the calibration text.
        seed: Seed of the tokens drawn from the model.
        progress: Called with the layers done and their total; each layer counts twice.

    Returns:
        The statistics on each text.

    Raises:
        InputError: activations or gradients are not finite (named by layer).
        RequestError: the cache's disk is too full.
    """
    # Made only if something is to be collected.
    stream = cache(partial(LayerStream, model))
    folders = [cache_folder("statistics", statistics_key(model, text, seed)) for text in texts]
    by_folder = dict(zip(folders, texts, strict=True))
    # In one order in all jobs, so that no two wait for each other.
    collections = {
        folder: _collection(model, stream, by_folder[folder], seed, folder, progress) for folder in sorted(by_folder)
    }
    _run_together(stream, list(collections.values()))
    return [Statistics(folder) for folder in folders]


# Yields the index of the layer that it needs next, or None for none, and is sent that layer.
_Steps = Generator[int | None, LoadedLayer | None, None]


def _run_together(stream: Callable[[], LayerStream], collections: list[_Steps]) -> None:
    """Run collections to their ends; a layer is loaded for all that need it next."""
    wanted: dict[int, int | None] = {}

    def go_on(number: int, layer: LoadedLayer | None) -> None:
        try:
            wanted[number] = collections[number].send(layer)
        except StopIteration:
            wanted.pop(number, None)

    with ExitStack() as closing_all:
        for one in collections:
            closing_all.enter_context(closing(one))
        for number in range(len(collections)):
            go_on(number, None)
        while wanted:
            index = next(iter(wanted.values()))
            alike = [number for number, one in wanted.items() if one == index]
            with nullcontext() if index is None else stream().layer(index) as layer:
                for number in alike:
                    go_on(number, layer)


def _collection(
    model: Model, stream: Callable[[], LayerStream], windows: Windows, seed: int, folder: Path, progress: Progress
) -> _Steps:
    """Fill a folder with the statistics on one text, unless it holds them."""
    if not _whole(folder, model):
        with locked(folder):
            # If files of an earlier run are missing, the second iteration starts from scratch.
            for _ in range(2):
                if not _whole(folder, model):
                    yield from _go_on(model, stream(), windows, seed, folder, progress)
    if not _whole(folder, model):
        raise DamagedEntryError(folder)
    for kind in ("inputs", "own", "gradient"):
        for number in _numbers(folder, kind):
            (folder / f"{kind}.{number}.npy").unlink(missing_ok=True)


def _whole(folder: Path, model: Model) -> bool:
    """Return whether a folder holds all statistics undamaged."""
    layers = range(model.decoder.layers)
    sites = site_columns(model)
    places = [
        *sites,
        HEAD_OUTPUT,
        *(output_place(block.layer, role) for block in model.decoder.blocks for role in block.linears),
    ]
    files = [f"{place}.range.npy" for place in places]
    files += [f"{site}.{kind}" for site in sites for kind in ("npy", "npz")]
    files += [f"{_gradients(layer)}.npz" for layer in (*layers, None)]
    return is_whole(folder / LAST) and all(is_whole(folder / file) for file in files)


def _go_on(model: Model, stream: LayerStream, windows: Windows, seed: int, folder: Path, progress: Progress) -> _Steps:
    """Collect the statistics that an earlier run did not."""
    there = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if (folder / LAST).exists() or not all(map(is_whole, there)):
        for path in there:
            path.unlink()
    there_bytes = sum(path.stat().st_size for path in folder.iterdir())
    require_space(folder, disk_bytes(model, windows.tokens.size) - there_bytes, NO_SPACE)
    own = stream.layer_inputs(windows.tokens)
    with filling(folder) as files:
        if not _numbers(folder, "gradient"):
            hidden = yield from _forwards(stream, windows, own, files, progress)
            # The head needs room: let the last layer go.
            yield None
            _keep(files, _gradient(stream.layers - 1), _head(model, stream, hidden, seed, files))
        while (index := max(_numbers(folder, "gradient"))) >= 0:
            progress(2 * stream.layers - 1 - index, 2 * stream.layers)
            layer = yield index
            assert layer is not None
            before = _backwards(layer, _kept(folder, _inputs(index)), own, _kept(folder, _gradient(index)), files)
            check_finite(before, f"gradient of layer {index}")
            _keep(files, _gradient(index - 1), before)
            # Delete the gradient first: while it exists, a resumed run starts with this layer and needs its inputs.
            (folder / _gradient(index)).unlink()
            for after in (index, index + 1):
                (folder / _inputs(after)).unlink(missing_ok=True)
        counts = np.bincount(windows.tokens.reshape(-1), minlength=model.decoder.vocab) / windows.tokens.size
        at_inputs = (
            [_mapped(folder, _own_gradient(layer)) for layer in range(stream.layers)] if own.rows is not None else []
        )
        squares = stream.table_gradients(windows.tokens, _kept(folder, _gradient(-1)), at_inputs)
    roles = dict.fromkeys(table.role for table in model.decoder.tables)
    looked_up = dict(zip(roles, squares, strict=True))
    save(folder / LAST, VECTORS, {"tokens": counts.astype(np.float32), **looked_up})
    progress(2 * stream.layers, 2 * stream.layers)


def _inputs(layer: int) -> str:
    return f"inputs.{layer}.npy"


def _gradient(layer: int) -> str:
    """Return the file name of the gradient at a layer's outputs; layer -1 is the embedding."""
    return f"gradient.{layer}.npy"


def _own_gradient(layer: int) -> str:
    """Return the file name of the gradient at a layer's own inputs."""
    return f"own.{layer}.npy"


def _numbers(folder: Path, kind: str) -> list[int]:
    return [int(path.name.split(".")[1]) for path in folder.glob(f"{kind}.*.npy")]


def _keep(files: Filling, name: str, values: torch.Tensor) -> None:
    """Write a temporary file for resuming an interrupted run."""
    files.save(name, ARRAY, values.numpy(), lasting=False)


def _kept(folder: Path, name: str) -> torch.Tensor:
    return torch.from_numpy(load(folder / name, ARRAY))


def _mapped(folder: Path, name: str) -> Float32:
    """Return an array of which only the parts that are used are read."""
    require_whole(folder / name)
    values: Float32 = np.load(folder / name, mmap_mode="c", allow_pickle=False)
    return values


@torch.inference_mode()
def _forwards(
    stream: LayerStream, windows: Windows, own: LayerInputs, files: Filling, progress: Progress
) -> Generator[int | None, LoadedLayer | None, torch.Tensor]:
    """Save every layer's inputs and return the last layer's outputs, float32 [windows, length, hidden]."""
    first = max(_numbers(files.path, "inputs"), default=None)
    if first is None:
        first = 0
        hidden = stream.embed(windows.tokens)
        _keep(files, _inputs(0), hidden)
    else:
        hidden = _kept(files.path, _inputs(first))
    for index in range(first, stream.layers):
        progress(index, 2 * stream.layers)
        layer = yield index
        assert layer is not None
        with observed_ranges(layer, files):
            hidden = layer.run(hidden, own)
        check_finite(hidden, f"layer {index}")
        _keep(files, _inputs(index + 1), hidden)
    return hidden


def _head(model: Model, stream: LayerStream, hidden: torch.Tensor, seed: int, files: Filling) -> torch.Tensor:
    """Draw a token at every position; save the head's statistics and return the gradient at the last layer."""
    divisor, cap = model.decoder.logits_divisor, model.decoder.logits_cap
    chance = torch.Generator().manual_seed(seed)
    head = stream.head()
    with torch.no_grad():
        save_head_ranges(stream.normalise(hidden), head, files, HEAD_SITE)
    gradient = torch.empty(hidden.shape)
    total = torch.zeros(len(head), dtype=torch.float64)
    moments = Moments(hidden.shape[-1])
    for window in range(len(hidden)):
        with torch.enable_grad():
            outputs = hidden[window].clone().requires_grad_()
            normalised = stream.normalise(outputs)
        at_normalised, weights = torch.empty(normalised.shape), torch.empty(len(normalised))
        for first in range(0, len(normalised), POSITIONS_AT_ONCE):
            part = slice(first, first + POSITIONS_AT_ONCE)
            logits = capped(normalised[part].detach() / divisor @ head.T, cap)
            # The derivative of c tanh(x / c) is 1 - tanh(x / c)^2.
            slope = None if cap is None else 1 - (logits / cap).square_()
            p = logits.softmax(-1)
            # The exact expectation of g^2 over drawn tokens.
            variance = torch.addcmul(p, p, p, value=-1)
            if slope is not None:
                variance *= slope.square()
            total += variance.sum(0)
            weights[part] = variance.sum(-1)
            drawn = _drawn(p, torch.rand(len(p), 1, generator=chance))
            p.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=p.dtype))
            at_normalised[part] = (p if slope is None else p.mul_(slope)) @ head / divisor
        (gradient[window],) = torch.autograd.grad(normalised, outputs, at_normalised)
        moments.add(normalised.detach()[None], weights[None], window)
    moments.save(files, HEAD_SITE)
    # Of the head's outputs, before they are divided and capped.
    means = total / (hidden[..., 0].numel() * divisor**2)
    files.save(f"{_gradients(None)}.npz", VECTORS, {"head": means.float().numpy()})
    return gradient


def _drawn(p: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Sample a token per row of probabilities, [positions, vocab], by inverse-transform sampling of draws in [0, 1).

    This takes a tenth of the time of torch.multinomial.
    """
    sums = p.cumsum(-1)
    return torch.searchsorted(sums, draws * sums[:, -1:], right=True).clamp(max=p.shape[-1] - 1)


def _backwards(
    layer: LoadedLayer, inputs: torch.Tensor, own: LayerInputs, gradient: torch.Tensor, files: Filling
) -> torch.Tensor:
    """Save one layer's statistics and return the gradient at its inputs, float32 [windows, length, channels]."""
    before, block = torch.empty_like(inputs), layer.block
    at_own: list[torch.Tensor] = []
    sums: dict[str, torch.Tensor] = {}
    with _observed(layer) as (seen, gradients):
        moments = {site.name: Moments(site.columns) for site in block.sites}
        for part, outputs, given in layer.differentiable(inputs, own):
            before[part], *more = torch.autograd.grad(outputs, given, gradient[part])
            at_own += more
            # No token of these windows may have reached an expert.
            tokens = {name: _squares(gradients.pop(name), name, sums) for name in block.linears if name in gradients}
            for site in block.sites:
                there = [linear.part for linear in site.linears]
                if there[0] in tokens or not site.routed:
                    moments[site.name].add(seen[there[0]], _weights([tokens[name] for name in there]), part.start)
            # Free the activations of these windows before the next.
            seen.clear()
    _pool_rare_experts(block, moments)
    for site in block.sites:
        moments.pop(site.name).save(files, site.name)
    count = gradient[..., 0].numel()
    squares = {
        name: (sums.get(name, torch.zeros(linear.group.rows)) / count).numpy() for name, linear in block.linears.items()
    }
    files.save(f"{_gradients(block.layer)}.npz", VECTORS, squares)
    if at_own:
        _keep(files, _own_gradient(block.layer), torch.cat(at_own))
    return before


def _pool_rare_experts(block: blocks.Block, moments: dict[str, Moments]) -> None:
    """Give an expert that fewer tokens reached than its inputs have channels the inputs of all experts of the layer.

    The second moment of so few inputs is singular.
    """
    by_kind: dict[str, list[blocks.Site]] = {}
    for site in block.sites:
        if site.routed:
            by_kind.setdefault(site.kind, []).append(site)
    for sites in by_kind.values():
        rare = [site for site in sites if moments[site.name].tokens < site.columns]
        if rare:
            pooled = Moments(sites[0].columns)
            for site in sites:
                pooled.add_all(moments[site.name])
            moments.update((site.name, pooled.copy()) for site in rare)


def _squares(gradient: torch.Tensor, name: str, sums: dict[str, torch.Tensor]) -> torch.Tensor:
    """Add the squares of a gradient, [windows, length, rows], to the sum of a matrix; return their sums by token."""
    squares = gradient.square()
    sums[name] = sums.get(name, torch.zeros(())) + squares.sum(dim=(0, 1))
    return squares.sum(-1)


def _weights(tokens: list[torch.Tensor]) -> torch.Tensor:
    """Return the weight of each token, [windows, length], about 1 on average; matrices of a site count equally.

    Args:
        tokens: Squared gradients of each matrix by token, float32 [windows, length].
    """
    return torch.stack([weights / weights.mean().clamp(min=1e-30) for weights in tokens]).mean(0)


@contextmanager
def _observed(layer: LoadedLayer) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Record, by `Linear.part`, the inputs of a layer's matrices and the gradients at their outputs."""
    inputs: dict[str, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor] = {}

    def watch(name: str, given: torch.Tensor, output: Outputs) -> None:
        inputs[name] = as_windows(given.detach())
        first_output(output).register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: gradients.__setitem__(name, as_windows(gradient))
        )

    hooks = [
        layer.module.get_submodule(linear.module).register_forward_hook(
            lambda _, given, output, name=name: watch(name, given[0], output)
        )
        for name, linear in layer.block.linears.items()
    ]
    try:
        yield inputs, gradients
    finally:
        for hook in hooks:
            hook.remove()
