"""Putting the dispatcher, and FP8 experts, into Megatron's models: built ones, or specs of those to be built."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, TypeVar

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from .dispatcher import MoeEpTokenDispatcher
from .experts import check_experts, use_fp8
from .options import DispatcherOptions

Model = TypeVar("Model")
Spec = TypeVar("Spec")

_log = logging.getLogger("moe_ep")

_DECLARED = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep"}
"""What the config says of this dispatcher. Megatron concludes from it that the 1F1B schedule must keep the tensors
that go into and come out of a dispatch, and that experts need not pad for quantised matrix products."""


def install(model: Model, **options: Any) -> Model:
    """Have every MoELayer of ``model`` use moe_ep, for its experts, too, with ``fp8_experts``; not collective.

    Args:
        model: a built Megatron model, or a list of model chunks; wrapped in DDP or not. A chunk without MoELayers
            stays as it is. Any ``moe_token_dispatcher_type`` will do that could be built: "alltoall" always can.
        **options: the fields of `DispatcherOptions`.

    Returns: ``model``, changed in place. Its config then says ``flex`` and ``hybridep``, which to Megatron means:
    rows arrive grouped by expert and padded.

    Raises InvalidInput, naming the flag, for a setting that can't be honoured; the model is then unchanged.
    """
    chosen = DispatcherOptions(**options)
    chunks = list(model) if isinstance(model, Iterable) and not isinstance(model, nn.Module) else [model]
    modules = [module for chunk in chunks for module in chunk.modules()]
    layers = [module for module in modules if isinstance(module, MoELayer)]
    dispatchers = [_make_dispatcher(layer, chosen) for layer in layers]
    for layer, dispatcher in zip(layers, dispatchers, strict=True):
        _use(layer, dispatcher)
    for module in modules:
        config = getattr(module, "config", None)
        if isinstance(config, TransformerConfig) and config.num_moe_experts is not None:
            _declare(config)
    _log.info("moe_ep dispatches the tokens of %d Mixture-of-Experts layers", len(layers))
    return model


class MoeEpLayer(MoELayer):
    """A MoELayer with this dispatcher, and FP8 experts if so chosen, for layer specs. `use_in_spec` puts it there.

    Args: as for MoELayer, and ``options``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        options: DispatcherOptions | None = None,
        **kwargs: Any,
    ) -> None:
        # MoELayer chooses its dispatcher from the config; alltoall is cheap to make and needs no other package.
        given, config.moe_token_dispatcher_type = config.moe_token_dispatcher_type, "alltoall"
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            config.moe_token_dispatcher_type = given
        _use(self, _make_dispatcher(self, options or DispatcherOptions()))
        _declare(config)


def use_in_spec(spec: Spec, **options: Any) -> Spec:
    """``spec`` (of a layer, a block, a hybrid stack, MTP) with MoeEpLayer in place of every MoELayer.

    ``options``: the fields of `DispatcherOptions`. The given spec is left as it is.
    """
    return _replace(spec, DispatcherOptions(**options))


def _make_dispatcher(layer: MoELayer, options: DispatcherOptions) -> MoeEpTokenDispatcher:
    old = (
        layer.token_dispatcher
    )  # it has the right groups, also where the model was given a collection of its own
    groups = SimpleNamespace(ep=old.ep_group, expt_tp=old.tp_group, tp_ep=old.tp_ep_group)
    if options.fp8_experts is not None:
        check_experts(layer.experts)
    return MoeEpTokenDispatcher(
        layer.num_local_experts, layer.local_expert_indices, layer.config, groups, options
    )


def _use(layer: MoELayer, dispatcher: MoeEpTokenDispatcher) -> None:
    if dispatcher.options.fp8_experts is not None:
        use_fp8(layer.experts, keep_weights=dispatcher.options.keep_fp8_weights)
    if layer.use_shared_expert and layer.shared_expert_overlap:
        dispatcher.set_shared_experts(layer.shared_experts)
    if layer.moe_layer_recompute:
        dispatcher.remember_handles_of(layer)
    layer.token_dispatcher = dispatcher
    if hasattr(layer, "_training_token_dispatcher"):  # of transformer_impl="inference_optimized"
        layer._training_token_dispatcher = dispatcher


def _declare(config: TransformerConfig) -> None:
    for name, value in _DECLARED.items():
        setattr(config, name, value)


def _replace(spec: Any, options: DispatcherOptions) -> Any:
    """``spec`` rebuilt along the ways to a MoELayer; everything else is the same object."""
    if isinstance(spec, ModuleSpec) and spec.module is MoELayer:
        return dataclasses.replace(spec, module=MoeEpLayer, params={**spec.params, "options": options})
    if isinstance(spec, functools.partial):
        if spec.func is MoELayer:
            return functools.partial(MoeEpLayer, *spec.args, options=options, **spec.keywords)
        keywords = {name: _replace(value, options) for name, value in spec.keywords.items()}
        same = _same(keywords.values(), spec.keywords.values())
        return spec if same else functools.partial(spec.func, *spec.args, **keywords)
    if isinstance(spec, list):
        values = [_replace(value, options) for value in spec]
        return spec if _same(values, spec) else values
    if dataclasses.is_dataclass(spec) and not isinstance(spec, (type, TransformerConfig)):
        values = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.init}
        changed = {name: _replace(value, options) for name, value in values.items()}
        return spec if _same(changed.values(), values.values()) else dataclasses.replace(spec, **changed)
    return functools.partial(MoeEpLayer, options=options) if spec is MoELayer else spec


def _same(new: Iterable, old: Iterable) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))
