"""DeepSeek-V3 in Megatron-LM's training loop, tokens dispatched by moe_ep.

    torchrun --nproc-per-node 2 -m moe_ep.recipes.megatron_deepseek_v3 --size train-s
    torchrun --nproc-per-node 2 -m moe_ep.recipes.megatron_deepseek_v3 --size train-s --dispatcher alltoall

A size is a list of Megatron's own command-line arguments (megatron_sizes/*.args, for any training script of
Megatron's); arguments given here come after them and win. The text is the Python standard library's own sources, read
as bytes, or --text FILES; the rest is Megatron's: logging, checkpoints, learning rate, parallelism, FP8.

Needs megatron-core 0.19, which needs Python 3.12, and Transformer Engine for MLA.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets import utils as dataset_utils
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.training import get_args, pretrain, print_rank_0
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.models.gpt import GPTModelConfig

from moe_ep.megatron import install

from .data import Text, evaluation_starts, load_corpus, sample_start
from .errors import RecipeError

SIZES = Path(__file__).with_name("megatron_sizes")
DISPATCHERS = ("moe_ep", "alltoall", "allgather", "flex")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train; on every rank of a torchrun."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    own, rest = add_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False)).parse_known_args(
        given
    )
    if own.print_arguments:
        print(shlex.join([*read_size(own.size), *rest]))
        return
    sys.argv[1:] = expand(given, own)
    args = parse_and_validate_args(extra_args_provider=add_arguments)
    # Compiled when Megatron is installed; it would compile them again, for which the package lacks the Makefile.
    dataset_utils.compile_helpers = lambda: None
    pretrain(
        pretrain_cfg_container_from_args(args, model_config(args)),
        make_datasets,
        ModelType.encoder_or_decoder,
        forward_step,
    )


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("moe_ep")
    group.add_argument("--size", help=f"arguments of {SIZES.name}/SIZE.args, before all others")
    group.add_argument(
        "--print-arguments", action="store_true", help="print those, for another script, and end"
    )
    group.add_argument("--dispatcher", choices=DISPATCHERS, default="moe_ep")
    group.add_argument("--dispatch-fp8", action="store_true", help="tokens travel as FP8 (moe_ep only)")
    group.add_argument(
        "--experts-fp8",
        action="store_true",
        help="experts compute in FP8, with moe_ep's products, on what travels as FP8 both ways (moe_ep only)",
    )
    group.add_argument(
        "--text", nargs="+", default=[], help="files or folders; else Python's standard library"
    )
    return parser


def expand(arguments: list[str], own: argparse.Namespace) -> list[str]:
    """What Megatron shall parse: the arguments of the size come before the given ones, which can so override them.

    Raises RecipeError for a size that there is not.
    """
    ranks = ["--expert-model-parallel-size", os.environ.get("WORLD_SIZE", "1")]
    of_size = [] if own.size is None else read_size(own.size)
    stock = own.dispatcher if own.dispatcher != "moe_ep" else "alltoall"  # to be replaced
    return [*ranks, *of_size, "--moe-token-dispatcher-type", stock, *arguments]


def read_size(name: str) -> list[str]:
    """The arguments in the file of a size: comments begin with ``#``, and ``@FILE`` stands for another file's."""
    path = SIZES / f"{name}.args"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in SIZES.glob("[!_]*.args")))
        raise RecipeError(f"--size is {name!r}; it must be one of {known}")
    words = [word for line in path.read_text().splitlines() for word in line.split("#")[0].split()]
    arguments = []
    for word in words:
        arguments += read_size(word[1:].removesuffix(".args")) if word.startswith("@") else [word]
    return arguments


def model_config(args: argparse.Namespace) -> GPTModelConfig:
    """What Megatron builds the model from. The hook is all that moe_ep needs."""
    config = gpt_config_from_args(args)
    chosen = ["fp8"] if args.dispatch_fp8 else []
    if args.experts_fp8:
        chosen = ["fp8", "fp8_backward", "fp8_experts"]
    if args.dispatcher == "moe_ep":
        config.pre_wrap_hooks.append(partial(install, **dict.fromkeys(chosen, "blockwise")))
    elif chosen:
        flag = "--experts-fp8" if args.experts_fp8 else "--dispatch-fp8"
        raise RecipeError(f"{flag} needs --dispatcher moe_ep; it is {args.dispatcher!r}")
    return config


class Samples(torch.utils.data.Dataset):
    """Windows of a text as Megatron's samples: int64 ``tokens``, ``labels``, ``position_ids`` and ``loss_mask`` [S]."""

    def __init__(
        self, text: Text, starts: Sequence[int] | None, count: int, seq_length: int, seed: int
    ) -> None:
        self.text, self.starts, self.count = text, starts, count
        self.seq_length, self.seed = seq_length, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.seq_length + 1
        if self.starts is None:
            start = sample_start(len(self.text), window, seed=self.seed, step=0, index=index)
        else:
            start = self.starts[index % len(self.starts)]
        tokens = self.text.window(start, window)
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "position_ids": torch.arange(self.seq_length),
            "loss_mask": torch.ones(self.seq_length),
        }


def make_datasets(num_samples: Sequence[int], vp_stage: int | None = None) -> tuple[Samples, Samples, None]:
    """For training, at random places, and for validation: windows of the text held out, the same each time."""
    args = get_args()
    if args.context_parallel_size > 1:
        raise RecipeError(
            f"--context-parallel-size is {args.context_parallel_size}; this recipe splits no sequence"
        )
    window = args.seq_length + 1
    corpus = load_corpus(args.text, window=window, vocab_size=args.padded_vocab_size)
    print_rank_0(f" > {corpus.describe()}")
    train, valid, _ = (number or 0 for number in num_samples)
    starts = evaluation_starts(len(corpus.held_out), window, max(1, args.eval_iters * args.global_batch_size))
    return (
        Samples(corpus.train, None, train, args.seq_length, args.seed),
        Samples(corpus.held_out, starts, valid, args.seq_length, args.seed),
        None,
    )


make_datasets.is_distributed = (
    True  # every rank reads the text, so none has to send it to its tensor-parallel peers
)


def forward_step(
    batches: Iterator[dict[str, torch.Tensor]], model: GPTModel, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    """One micro-batch: the losses ``[B, S]`` of its tokens, or the schedule that will compute them; and their sum."""
    batch = {name: tensor.cuda(non_blocking=True) for name, tensor in next(batches).items()}
    run = model.build_schedule_plan if return_schedule_plan else model
    losses = run(
        batch["tokens"],
        batch["position_ids"],
        None,  # attention is causal
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return losses, partial(sum_loss, batch["loss_mask"])


def sum_loss(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The sum, the number of tokens, and both for the log."""
    mask = loss_mask.flatten().float()
    total = (losses.flatten().float() * mask).sum()
    number = mask.sum().to(torch.int)
    return total, number, {"lm loss": torch.stack([total.detach(), number.float()])}


if __name__ == "__main__":
    os.environ.setdefault(
        "CUDA_DEVICE_MAX_CONNECTIONS", "32"
    )  # 1 would put kernels of all streams in one queue
    main()
