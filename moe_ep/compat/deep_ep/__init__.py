"""DeepEP's Python interface on moe_ep: code written for `deep_ep` runs on it by changing one import."""

from .utils.event import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
