"""Quantization-error propagation: a matrix compensates for the errors of the matrices before it.

The input x' of a matrix W in the compressed model differs from the source's x because of all earlier rounding. The
matrix whose outputs come closest to W x is then not W, but

    W* = W + R E[x' x'^T]^-1,    R = a W E[(x - x') x'^T] + b E[(r - r') x'^T],

with a ridge on the second moment. The first term is from Arai and Ichikawa (2025, QEP, section 4), who compensate for
a share a of the difference, since all of it would be overfitted to the text. The second applies if W's outputs are
added to the residual stream r. It compensates for a share b of the stream's error so far. W* is then rounded in place
of W.

Both models run side by side on the calibration text, a layer at a time, and stop at each site.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from exporter.calibrate.bf16_matmul import quick_products
from exporter.calibrate.layer_stream import LayerStream, check_finite
from exporter.calibrate.paused_layer import PausedLayer
from exporter.calibrate.second_moments import add_products
from exporter.calibrate.windows import Tokens
from exporter.formats.format import Float32
from exporter.foundation.fitted import fitted_constants
from exporter.model.blocks import Linear, Site, Sublayer
from exporter.model.model import Model

# Compensated shares of the differences of the inputs and of the residual stream, and the ridge, as a share of the mean
# of the second moment's diagonal.
FITTED = fitted_constants("exporter.compress")
INPUTS_SHARE = FITTED["propagated_inputs_share"].value
STREAM_SHARE = FITTED["propagated_stream_share"].value
RIDGE = FITTED["propagation_ridge"].value


class SiteErrors:
    """What earlier rounding did to the inputs of a site, and how the matrices there compensate for it.

    The matrices of experts do not: the compressed model may send a token to other experts than the source.
    """

    def __init__(self, source: PausedLayer, compressed: PausedLayer, site: Site, onto_the_stream: float) -> None:
        self._source, self._compressed = source, compressed
        self._difference = None if site.routed else _difference(source, compressed, site, onto_the_stream)

    def weight(self, linear: Linear) -> Float32:
        """Return the source's weights of a matrix, float32 [rows, columns]; they must not be changed."""
        return self._source.weight(linear)

    @torch.inference_mode()
    @quick_products()
    def compensated(self, weight: Float32) -> Float32:
        """Return W* for W, float32 [rows, columns]."""
        return weight if self._difference is None else self._difference.made_up(torch.from_numpy(weight)).numpy()

    def follow(self, linear: Linear, planned: Float32) -> None:
        """Continue the compressed model with the decoded values of a matrix, float32 [rows, columns]."""
        self._compressed.replace(linear, planned)


def propagated_errors(model: Model, tokens: Tokens, looked_up: Sequence[Float32]) -> Iterator[tuple[Site, SiteErrors]]:
    """Run the source and the compressed model through the layers side by side; yield each site when both reach it.

    Args:
        model: The source.
        tokens: Windows of the calibration text, int64 [windows, length].
        looked_up: The compressed rows of each of the decoder's tables, for each token of the text in ascending order,
            float32 [tokens, columns].

    Yields:
        The sites in the order of computation. `follow` must be called for every matrix of one before the next.

    Raises:
        InputError: activations are not finite (named by layer).
    """
    streams = LayerStream(model), LayerStream(model)
    places = np.unique(tokens, return_inverse=True)[1].reshape(tokens.shape)
    hidden = streams[0].embed(tokens), streams[1].scaled(looked_up[0][places])
    inputs = streams[0].layer_inputs(tokens), streams[1].layer_inputs(tokens, looked_up)
    for block in model.decoder.blocks:
        for one in hidden:
            check_finite(one, f"inputs of layer {block.layer}")
        with (
            streams[0].layer(block.layer) as source_layer,
            streams[1].layer(block.layer, like=source_layer) as compressed_layer,
            PausedLayer(source_layer, hidden[0], inputs[0]) as source,
            PausedLayer(compressed_layer, hidden[1], inputs[1]) as compressed,
        ):
            for sublayer in block.sublayers:
                for site in sublayer.sites:
                    # Experts run as a whole after the site before them, with matrices that were all replaced.
                    if not site.routed:
                        _advance(source, compressed)
                    yield site, SiteErrors(source, compressed, site, _weight_in_the_stream(sublayer, site))
            _advance(source, compressed)
            hidden = source.hidden, compressed.hidden


def _weight_in_the_stream(sublayer: Sublayer, site: Site) -> float:
    """Return the factor with which a site's outputs are added to the residual stream; 0 if they are not, or not so."""
    return sublayer.residual_scale if site == sublayer.sites[-1] and sublayer.norm_after is None else 0.0


@torch.inference_mode()
@quick_products()
def _advance(*passes: PausedLayer) -> None:
    for one in passes:
        one.advance()


@torch.inference_mode()
@quick_products()
def _difference(source: PausedLayer, compressed: PausedLayer, site: Site, onto_the_stream: float) -> "_Difference":
    return _Difference(source, compressed, site.columns, onto_the_stream)


class _Difference:
    """The difference of two models at a site, and the compensation for it by a matrix there."""

    def __init__(self, source: PausedLayer, compressed: PausedLayer, columns: int, onto_the_stream: float) -> None:
        tokens = compressed.hidden[..., 0].numel()
        moment, self._inputs = torch.zeros(columns, columns), torch.zeros(columns, columns)
        self._stream: torch.Tensor | None = None
        if onto_the_stream:
            self._stream = torch.zeros(compressed.stream[0].shape[-1], columns)
        for part in compressed.parts:
            given = compressed.inputs[part.start].flatten(0, 1)
            add_products(moment, given, 1 / tokens)
            missing = source.inputs[part.start].flatten(0, 1) - given
            # Not `addmm_`: these sums need not be positive definite, so `quick_products` may round them.
            self._inputs.add_(missing.T @ given, alpha=INPUTS_SHARE / tokens)
            if self._stream is not None:
                lost = (source.stream[part.start] - compressed.stream[part.start]).flatten(0, 1)
                self._stream.add_(lost.T @ given, alpha=STREAM_SHARE / onto_the_stream / tokens)
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
