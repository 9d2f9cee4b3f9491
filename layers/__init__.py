"""The layers of a DeepSeek-V3-style model around ``moe_ep.dispatch`` and ``moe_ep.combine``.

Shape letters: T tokens of this rank, B sequences of S tokens, H hidden, E experts, L local experts, K top-k,
F width of a feed-forward, N rows received for local experts, V vocabulary.
"""

from .attention import MultiHeadLatentAttention
from .config import ModelConfig
from .experts import GroupedExperts
from .feed_forward import FeedForward, SharedExperts
from .initialise import initialise_weights
from .micro_batch import MicroBatchSchedule
from .model import DeepSeekModel, ModelOutput
from .moe_layer import MoELayer
from .mtp import MtpModule
from .norm import RMSNorm
from .parallel import (
    ParallelGroups,
    build_model,
    clip_grad_norm,
    load_sharded_model_state,
    load_sharded_optimizer_state,
    reduce_gradients,
    sharded_model_state,
    sharded_optimizer_state,
    update_expert_biases,
)
from .rope import RotaryEmbedding
from .router import Router, RouterOutput
from .sizes import ParameterCounts
from .token_dispatcher import TokenDispatcher
from .transformer import TransformerBlock
from .weight_gradients import GradAccumulation, WeightGradStore

__all__ = [
    "DeepSeekModel",
    "FeedForward",
    "GradAccumulation",
    "GroupedExperts",
    "MicroBatchSchedule",
    "MoELayer",
    "ModelConfig",
    "ModelOutput",
    "MtpModule",
    "MultiHeadLatentAttention",
    "ParallelGroups",
    "ParameterCounts",
    "RMSNorm",
    "RotaryEmbedding",
    "Router",
    "RouterOutput",
    "SharedExperts",
    "TokenDispatcher",
    "TransformerBlock",
    "WeightGradStore",
    "build_model",
    "clip_grad_norm",
    "initialise_weights",
    "load_sharded_model_state",
    "load_sharded_optimizer_state",
    "reduce_gradients",
    "sharded_model_state",
    "sharded_optimizer_state",
    "update_expert_biases",
]
