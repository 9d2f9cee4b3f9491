"""Gradients, clipping, biases and checkpoints over processes, against one process with all the data."""

import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import run_gloo
from torch.distributed.tensor import DTensor

from moe_ep.errors import InvalidInput
from moe_ep.layers import (
    ModelConfig,
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

CONFIG = ModelConfig(
    vocab_size=40,
    num_layers=2,
    hidden=32,
    num_heads=2,
    ffn_hidden=48,
    moe_ffn_hidden=16,
    shared_ffn_hidden=16,
    num_experts=8,
    num_topk=2,
    mtp_layers=1,
    max_seq_len=16,
    seq_aux_loss_coeff=0.1,
    bias_update_rate=0.01,
)
WORLD = 4
STEPS = 3


def text(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 9), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def make(groups, dtype=torch.float64):
    model = build_model(CONFIG, groups, max_tokens_per_rank=16, seed=7, dtype=dtype)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train_step(model, optimizer, groups, step, max_norm=0.5):
    """One step on the data of all four ranks; with fewer processes each takes several batches in turn."""
    share = WORLD // groups.world_size
    optimizer.zero_grad()
    for rank in range(groups.rank * share, (groups.rank + 1) * share):
        (model(*text(rank, step)).loss / share).backward()
    reduce_gradients(model, groups)
    norm = clip_grad_norm(model, groups, max_norm)
    gradients = {name: whole(p.grad, p, groups) for name, p in model.named_parameters()}
    optimizer.step()
    return norm, gradients, update_expert_biases(model, groups)


def whole(tensor, parameter, groups):
    """An expert tensor of all experts, any other as it is."""
    if not getattr(parameter, "is_expert", False) or groups.ep_size == 1:
        return tensor.clone()
    pieces = [torch.empty_like(tensor) for _ in range(groups.ep_size)]
    dist.all_gather(pieces, tensor.contiguous(), group=groups.ep_group)
    return torch.cat(pieces)


def train(groups):
    model, optimizer = make(groups)
    steps = [train_step(model, optimizer, groups, step) for step in range(STEPS)]
    weights = {name: whole(p.detach(), p, groups) for name, p in model.named_parameters()}
    biases = torch.stack([router.expert_bias for router in model.routers()])
    model.comm.close()
    return steps, weights, biases


def state_of(model, optimizer, groups):
    optimizer_state = sharded_optimizer_state(model, optimizer, groups)
    return {"model": sharded_model_state(model, groups), "optimizer": optimizer_state}


def save_and_reload(directory):
    """Trains, saves with EP 2 and goes on; then loads with EP 1, 4 and 2, each time going on alike."""
    groups = ParallelGroups.create(2)
    model, optimizer = make(groups)
    train_step(model, optimizer, groups, 0)
    state = {
        "model": sharded_model_state(model, groups),
        "optimizer": sharded_optimizer_state(model, optimizer, groups),
    }
    expert = state["model"]["layers.1.moe.experts.w_down"]
    assert isinstance(expert, DTensor) and expert.shape == (8, 32, 16)
    assert isinstance(state["optimizer"]["layers.1.moe.experts.w_down.exp_avg"], DTensor)
    dcp.save(state, checkpoint_id=directory)
    results = [train_step(model, optimizer, groups, 1)]
    model.comm.close()
    for ep_size in (1, 4, 2):
        groups = ParallelGroups.create(ep_size)
        results.append(reload(directory, groups))
    return results


def reload(directory, groups):
    model, optimizer = make(groups)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    state = {
        "model": sharded_model_state(model, groups),
        "optimizer": sharded_optimizer_state(model, optimizer, groups),
    }
    dcp.load(state, checkpoint_id=directory)
    result = train_step(model, optimizer, groups, 1)
    model.comm.close()
    return result


def four_processes(directory):
    """All that the tests below look at, from one start of the processes."""
    results = {ep_size: train(ParallelGroups.create(ep_size)) for ep_size in (1, 2, 4)}
    with pytest.raises(InvalidInput, match=r"ep_size must divide the number of ranks \(4\); got 3"):
        ParallelGroups.create(3)
    groups = ParallelGroups.create(2)
    grid = (groups.ep_rank, dist.get_process_group_ranks(groups.ep_group))
    copies = dist.get_process_group_ranks(groups.expert_dp_group)
    return results, save_and_reload(directory), (*grid, copies)


@pytest.fixture(scope="module")
def checkpoint():
    with tempfile.TemporaryDirectory() as directory:
        yield directory


@pytest.fixture(scope="module")
def spread(checkpoint):
    return run_gloo(WORLD, four_processes, checkpoint)


@pytest.fixture(scope="module")
def alone():
    return train(ParallelGroups.create(1))


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_training_equals_one_process(ep_size, spread, alone):
    steps, weights, biases = alone
    for results, _, _ in spread:
        got_steps, got_weights, got_biases = results[ep_size]
        for (norm, gradients, load), (got_norm, got_gradients, got_load) in zip(
            steps, got_steps, strict=True
        ):
            torch.testing.assert_close(got_norm, norm)
            torch.testing.assert_close(got_gradients, gradients)
            assert torch.equal(got_load, load)
        torch.testing.assert_close(got_weights, weights)
        assert torch.equal(got_biases, biases)
        assert got_biases.any()


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_ranks_stay_bitwise_equal(ep_size, spread):
    first = spread[0][0][ep_size]
    for results, _, _ in spread[1:]:
        for (norm, gradients, load), mine in zip(results[ep_size][0], first[0], strict=True):
            assert torch.equal(norm, mine[0])
            assert all(torch.equal(gradients[name], mine[1][name]) for name in gradients)
            assert torch.equal(load, mine[2])


def test_checkpoint_goes_on_the_same_onto_other_ep_sizes(spread):
    for _, results, _ in spread:
        for reloaded in results[1:]:
            torch.testing.assert_close(reloaded, results[0])


def test_checkpoint_of_four_processes_loads_into_one(spread, checkpoint):
    torch.testing.assert_close(reload(checkpoint, ParallelGroups.create(1)), spread[0][1][0])


def test_groups(spread):
    grids = [grid for _, _, grid in spread]
    assert grids == [(0, [0, 1], [0, 2]), (1, [0, 1], [1, 3]), (0, [2, 3], [0, 2]), (1, [2, 3], [1, 3])]


def test_clipping_by_hand():
    groups = ParallelGroups.create(1)
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_grad_norm(model, groups, 10.0).item() == 5.0
    assert model.weight.grad.tolist() == [[3.0, 4.0]]
    assert clip_grad_norm(model, groups, 1.0).item() == 5.0
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.8]]))
    model.weight.grad = torch.tensor([[torch.inf, 4.0]])
    assert clip_grad_norm(model, groups, 1.0).isinf()
    assert model.weight.grad.tolist() == [[torch.inf, 4.0]]


def test_fresh_optimizer_state_changes_nothing():
    groups = ParallelGroups.create(1)
    model, optimizer = make(groups)
    before = [parameter.clone() for parameter in model.parameters()]
    state = sharded_optimizer_state(model, optimizer, groups)
    assert state["head.weight.step"].item() == 0
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_copying_states():
    groups = ParallelGroups.create(1)
    source, source_optimizer = make(groups)
    train_step(source, source_optimizer, groups, 0)
    target, target_optimizer = make(groups)
    load_sharded_model_state(target, groups, sharded_model_state(source, groups))
    state = sharded_optimizer_state(source, source_optimizer, groups)
    load_sharded_optimizer_state(target, target_optimizer, groups, state)
    torch.testing.assert_close(
        train_step(target, target_optimizer, groups, 1),
        train_step(source, source_optimizer, groups, 1),
        rtol=0,
        atol=0,
    )
    with pytest.raises(InvalidInput, match=r"state does not fit: \d+ entries are missing, .* 1 are unknown"):
        load_sharded_model_state(target, groups, {"other": torch.zeros(1)})
