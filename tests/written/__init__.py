"""Tiny models written the way people write their own: parameters used in operations, rather than in modules that own them."""

from . import (
    activations,
    attention,
    convolutions,
    derivatives,
    in_place,
    inputs,
    linear,
    mixtures,
    normalizations,
    recurrent,
    sharing,
    tables,
    weights,
)

# name -> (model, shape of a sample or what draws a batch, None for two inputs [n, 4])
WRITTEN = {
    **linear.MODELS,
    **weights.MODELS,
    **sharing.MODELS,
    **activations.MODELS,
    **normalizations.MODELS,
    **tables.MODELS,
    **attention.MODELS,
    **recurrent.MODELS,
    **convolutions.MODELS,
    **mixtures.MODELS,
    **inputs.MODELS,
    **in_place.MODELS,
    **derivatives.MODELS,
}
