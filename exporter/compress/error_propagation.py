"""Quantization-error propagation: a matrix compensates for the errors of the matrices before it.

The input x' of a matrix W in the compressed model differs from the source's x because of all earlier rounding. The
matrix whose outputs come closest to W x is then not W, but

    W* = W + R E[x' x'^T]^-1,    R = a W E[(x - x') x'^T] + b E[(r - r') x'^T],

with a ridge on the second moment. The first term is from Arai and Ichikawa (2025, QEP, section 4), who compensate for
a share a of the difference, since all of it would be overfitted to the text. The second applies if W's outputs are
added to the residual stream r. It compensates for a share b of the stream's error so far. W* is then rounded in place
of W.

Both models run side by side on the calibration text, a layer at a time.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from exporter.calibrate.bf16_matmul import quick_products
from exporter.calibrate.layer_stream import LayerStream, check_finite, parts
from exporter.calibrate.second_moments import add_products
from exporter.calibrate.windows import Tokens
from exporter.formats.format import Float32
from exporter.formats.group import WeightGroup
from exporter.foundation.fitted import fitted_constants
from exporter.model.families import LINEARS
from exporter.model.model import Model

# Compensated shares of the differences of the inputs and of the residual stream, and the ridge, as a share of the mean
# of the second moment's diagonal.
FITTED = fitted_constants("exporter.compress")
INPUTS_SHARE = FITTED["propagated_inputs_share"].value
STREAM_SHARE = FITTED["propagated_stream_share"].value
RIDGE = FITTED["propagation_ridge"].value
SITES = ("attention_in", "attention_out", "mlp_in", "mlp_out")
INTO_THE_STREAM = ("attention_out", "mlp_out")


class ErrorPropagation:
    """Runs the source and the compressed model through the layers side by side.

    Matrices must be requested in the order of the model's computation; those with the same input in any order.

    Args:
        model: The source.
        tokens: Windows of the calibration text, int64 [windows, length].
        embedded: Returns the compressed embeddings of tokens, float32 [windows, length, hidden].
    """

    def __init__(self, model: Model, tokens: Tokens, embedded: Callable[[Tokens], Float32]) -> None:
        self._source, self._compressed = LayerStream(model), LayerStream(model)
        self._tokens, self._embedded = tokens, embedded
        self._opened = ExitStack()
        self._passes: tuple[_Pass, _Pass] | None = None
        self._place = (-1, SITES[-1])
        self._difference: _Difference | None = None

    @torch.inference_mode()
    @quick_products()
    def wanted(self, group: WeightGroup, weight: Float32) -> Float32:
        """Return W*, float32 [rows, columns]; matrices outside the layers stay as they are.

        Raises:
            ValueError: the matrix is out of order.
        """
        if group.layer is None:
            return weight
        site = LINEARS[group.role][1]
        if self._place != (group.layer, site):
            self._advance(group.layer, site, group.columns)
        assert self._difference is not None
        return self._difference.made_up(torch.from_numpy(weight)).numpy()

    @torch.inference_mode()
    @quick_products()
    def follow(self, group: WeightGroup, planned: Float32) -> None:
        """Continue the compressed model with the decoded values of a matrix, float32 [rows, columns]."""
        if group.layer is None:
            return
        assert self._passes is not None
        linear = self._passes[1].module.get_submodule(LINEARS[group.role][0])
        linear.weight = nn.Parameter(torch.from_numpy(planned), requires_grad=False)
        if LINEARS[group.role][1] == SITES[-1]:
            for one in self._passes:
                one.finish()
            self._opened.close()

    def _advance(self, layer: int, site: str, columns: int) -> None:
        before_layer, before = self._place
        entering = before == SITES[-1]
        turn = (before_layer + 1, SITES[0]) if entering else (before_layer, SITES[SITES.index(before) + 1])
        if (layer, site) != turn:
            raise ValueError(f"layer {layer} {site} comes out of turn: after layer {before_layer} {before}")
        if entering:
            self._enter(layer)
        assert self._passes is not None
        for one in self._passes:
            one.reach(site)
        self._place = turn
        self._difference = _Difference(*self._passes, site, columns)

    def _enter(self, layer: int) -> None:
        if self._passes is None:
            hidden = self._source.embed(self._tokens), torch.from_numpy(self._embedded(self._tokens))
        else:
            hidden = self._passes[0].hidden, self._passes[1].hidden
        for one in hidden:
            check_finite(one, f"inputs of layer {layer}")
        source, compressed = (self._opened.enter_context(one.layer(layer)) for one in (self._source, self._compressed))
        self._passes = _Pass(self._source, source, hidden[0]), _Pass(self._compressed, compressed, hidden[1])


class _Pass:
    """One model in one layer.

    Attributes:
        module: The layer; its matrices are the model's up to the current site.
        hidden: The residual stream, float32 [windows, length, hidden]: before the layer; from `mlp_in` on, before its
            feed-forward part; after `finish`, behind the layer.
    """

    def __init__(self, stream: LayerStream, module: nn.Module, hidden: torch.Tensor) -> None:
        self._stream, self.module, self.hidden = stream, module, hidden
        # Inputs of the last matrix of the layer's part, by first window; these are the most expensive to compute.
        self._last: dict[int, torch.Tensor] = {}

    def reach(self, site: str) -> None:
        """Advance to the next site."""
        if site == "attention_out":
            self._keep(lambda part: self._stream.attended(self.module, self.hidden[part]))
        elif site == "mlp_in":
            self._add("self_attn.o_proj")
        elif site == "mlp_out":
            self._keep(self._gated)

    def inputs(self, site: str, part: slice) -> torch.Tensor:
        """Return the inputs of a site's matrices for one of `parts`, float32 [windows, length, columns]."""
        if site in INTO_THE_STREAM:
            return self._last[part.start]
        norm = "input_layernorm" if site == "attention_in" else "post_attention_layernorm"
        normalised: torch.Tensor = self.module.get_submodule(norm)(self.hidden[part])
        return normalised

    def finish(self) -> None:
        """Finish the layer."""
        self._add("mlp.down_proj")

    def _gated(self, part: slice) -> torch.Tensor:
        mlp: Any = self.module.get_submodule("mlp")
        normalised = self.inputs("mlp_in", part)
        gated: torch.Tensor = mlp.act_fn(mlp.gate_proj(normalised))
        return gated.mul_(mlp.up_proj(normalised))

    def _keep(self, given: Callable[[slice], torch.Tensor]) -> None:
        self._last = {part.start: given(part) for part in parts(self.hidden)}

    def _add(self, path: str) -> None:
        linear = self.module.get_submodule(path)
        for part in parts(self.hidden):
            self.hidden[part] += linear(self._last.pop(part.start))


class _Difference:
    """The difference of two models at a site, and the compensation for it by a matrix there."""

    def __init__(self, source: _Pass, compressed: _Pass, site: str, columns: int) -> None:
        tokens = compressed.hidden[..., 0].numel()
        moment, self._inputs = torch.zeros(columns, columns), torch.zeros(columns, columns)
        self._stream: torch.Tensor | None = None
        if site in INTO_THE_STREAM:
            self._stream = torch.zeros(compressed.hidden.shape[-1], columns)
        for part in parts(compressed.hidden):
            given = compressed.inputs(site, part).flatten(0, 1)
            add_products(moment, given, 1 / tokens)
            missing = source.inputs(site, part).flatten(0, 1) - given
            # Not `addmm_`: these sums need not be positive definite, so `quick_products` may round them.
            self._inputs.add_(missing.T @ given, alpha=INPUTS_SHARE / tokens)
            if self._stream is not None:
                lost = (source.hidden[part] - compressed.hidden[part]).flatten(0, 1)
                self._stream.add_(lost.T @ given, alpha=STREAM_SHARE / tokens)
        diagonal = moment.diagonal()
        diagonal += RIDGE * diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
        # `cholesky` reads only the lower triangle.
        self._factor = torch.linalg.cholesky(moment)

    def made_up(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W* for W, float32 [rows, columns]."""
        missed = weight @ self._inputs
        if self._stream is not None:
            missed += self._stream
        return weight + torch.cholesky_solve(missed.T, self._factor).T
