"""Batch norm over groups against separate batch norms and the formula for running statistics, also on real ranks."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fvcore.nn.precise_bn import update_bn_stats
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import PRELOADED_MODULES

from mgvideo.errors import UserError
from mgvideo.layers import batchnorm
from mgvideo.layers.batchnorm import GroupBatchNorm3d, convert_group_batchnorm, deferred_running_stats, set_bn_groups
from mgvideo.layers.bn_kernels import GpuGroupNormalise
from mgvideo.loading.workers import start_fork_server

pytestmark = pytest.mark.numeric

CHANNELS = 6
CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # in float64
LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


def clips(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return random clips `[n, 6, 2, 3, 3]`; every clip and channel has its own mean and scale."""
    g = torch.Generator().manual_seed(seed)
    values, mean, scale = (torch.randn(n, CHANNELS, *s, generator=g) for s in ((2, 3, 3), (1, 1, 1), (1, 1, 1)))
    return (values * (1 + scale.abs()) + 3 * mean).to(dtype)


def strip_file_scheme(dtype: torch.dtype = torch.float64) -> nn.BatchNorm3d:
    """Return torch's batch norm with random parameters and running statistics, the same at each call."""
    g = torch.Generator().manual_seed(7)
    bn = nn.BatchNorm3d(CHANNELS, momentum=0.3).to(dtype)
    for tensor in (bn.weight.data, bn.bias.data, bn.running_mean, bn.running_var):
        tensor.copy_(torch.rand(CHANNELS, generator=g) + 0.5)
    return bn


def grouped(groups: int, dtype: torch.dtype = torch.float64) -> GroupBatchNorm3d:
    """Return `plain`, converted, with a number of groups."""
    bn = convert_group_batchnorm(strip_file_scheme(dtype))
    set_bn_groups(bn, groups)
    return bn


def step(bn: nn.Module, x: Tensor, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output, and the gradients of input, weight and bias for a fixed random gradient of the output."""
    x = x.clone().requires_grad_()
    y = bn(x)
    grads = torch.autograd.grad((y * clips(len(x), seed, y.dtype)).sum(), [x, bn.weight, bn.bias])
    return y.detach(), *grads


def aggregate(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Combine statistics of groups, `[groups, channels]`, into a running mean and variance, by the formula."""
    return means.mean(0), variances.mean(0) + means.var(0, correction=0)


def state_after(bn: nn.BatchNorm3d, x: Tensor, groups: int) -> dict[str, Tensor]:
    """Return the state dict that `bn` should have after one update with x in a number of groups."""
    chunks = x.double().unflatten(0, (groups, -1))
    mean, var = aggregate(chunks.mean((1, 3, 4, 5)), chunks.var((1, 3, 4, 5)))
    state = {key: value.clone() for key, value in bn.state_dict().items()}
    state["running_mean"] = ((1 - bn.momentum) * bn.running_mean + bn.momentum * mean).to(x.dtype)
    state["running_var"] = ((1 - bn.momentum) * bn.running_var + bn.momentum * var).to(x.dtype)
    state["num_batches_tracked"] += 1
    return state


def test_conversion_keeps_modules_parameters_and_names():
    model = nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), nn.GroupNorm(2, 4))
    before = list(model), list(model.parameters()), list(model.state_dict())
    assert convert_group_batchnorm(model) is model
    assert [type(m) for m in model] == [nn.Conv3d, GroupBatchNorm3d, nn.GroupNorm]
    for old, new in zip(before, (list(model), list(model.parameters()), list(model.state_dict())), strict=True):
        assert all(a is b or a == b for a, b in zip(old, new, strict=True))
    nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), nn.GroupNorm(2, 4)).load_state_dict(model.state_dict())
    assert convert_group_batchnorm(model) is model, "converting twice is fine"


@pytest.mark.parametrize(
    ("layer", "advice"),
    [
        (nn.BatchNorm1d(4), "of size 1"),
        (nn.BatchNorm2d(4), "of size 1"),
        (nn.SyncBatchNorm(4), "shared among ranks"),
        (type("CustomNorm", (nn.BatchNorm3d,), {})(4), "use nn.BatchNorm3d itself"),
        (nn.LazyBatchNorm3d(), "with its number of channels"),
        (nn.InstanceNorm3d(4, track_running_stats=True), "track_running_stats to False"),
        (nn.InstanceNorm1d(4, track_running_stats=True), "track_running_stats to False"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_message_names_a_layer_whose_statistics_would_differ_between_ranks(layer: nn.Module, advice: str):
    model = nn.ModuleDict({"stem": nn.BatchNorm3d(4), "block": nn.Sequential(nn.ReLU(), layer)})
    with pytest.raises(UserError) as error:
        convert_group_batchnorm(model)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"model: block.1 ({type(layer).__name__})")
    assert advice in line


def test_layers_that_normalise_each_clip_stay_unchanged():
    layers = [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm3d(4), nn.LocalResponseNorm(2)]
    model = convert_group_batchnorm(nn.Sequential(*layers))
    assert [type(layer) for layer in model] == [type(layer) for layer in layers]


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_group_equals_batchnorm(deferred: bool, momentum: float | None):
    want, got = strip_file_scheme(torch.float32), grouped(1, torch.float32)
    want.momentum = got.momentum = momentum
    for seed in range(3):
        x = clips(8, seed, torch.float32)
        expected = step(want, x)
        if deferred:
            with deferred_running_stats(got):
                actual = step(got, x)
        else:
            actual = step(got, x)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(got.state_dict(), want.state_dict(), rtol=3e-7, atol=0)
    torch.testing.assert_close(got.eval()(x), want.eval()(x))


@pytest.fixture(params=["cpu_path", "gpu_path"])
def normalise_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test twice on this CPU: with the code that normalises groups on CPUs, and with that for GPUs."""
    if request.param == "gpu_path":
        monkeypatch.setattr(batchnorm, "choose_kernels", lambda *_: GpuGroupNormalise)


@pytest.mark.usefixtures("normalise_path")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [2, 4, 8])
def test_groups_equal_separate_batchnorms(groups: int, layout: torch.memory_format):
    x = clips(8)
    gradient = clips(8, seed=1)
    want = []
    for x_i, g_i in zip(x.chunk(groups), gradient.chunk(groups), strict=True):
        bn = strip_file_scheme()
        x_i = x_i.clone().requires_grad_()
        y_i = bn(x_i)
        want.append((y_i.detach(), *torch.autograd.grad(y_i, [x_i, bn.weight, bn.bias], g_i)))
    y, dx, dweight, dbias = zip(*want, strict=True)
    got = step(grouped(groups), x.to(memory_format=layout))
    torch.testing.assert_close(got, (torch.cat(y), torch.cat(dx), sum(dweight), sum(dbias)), **CLOSE)
    assert got[0].is_contiguous(memory_format=layout)
    assert got[1].is_contiguous(memory_format=layout)


def test_without_affine_parameters_and_running_statistics():
    bn = convert_group_batchnorm(nn.BatchNorm3d(CHANNELS, affine=False, track_running_stats=False))
    set_bn_groups(bn, 2)
    x = clips(4).requires_grad_()
    with deferred_running_stats(bn):
        y = bn(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, torch.cat([nn.BatchNorm3d(CHANNELS).double()(x_i) for x_i in x.chunk(2)]))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("channels", [2, 8, 10])
def test_few_channels(channels: int, groups: int):
    # Positions are folded into channels: there are fewer than 16 channels and many positions, in channels_last.
    many = torch.randn(8, channels, 4, 32, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3
    gradient, layout = many.roll(1, 0).square(), torch.channels_last_3d
    want, got = nn.BatchNorm3d(channels).double(), convert_group_batchnorm(nn.BatchNorm3d(channels).double())
    set_bn_groups(got, groups)
    results = []
    for bn, xs in ((want, many.chunk(groups)), (got, [many.to(memory_format=layout)])):
        xs = [x.detach().requires_grad_() for x in xs]
        y = torch.cat([bn(x) for x in xs])
        y.backward(gradient)
        results.append((y.detach(), torch.cat([x.grad for x in xs]), bn.weight.grad, bn.bias.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    assert y.is_contiguous(memory_format=layout)
    fresh = nn.BatchNorm3d(channels, momentum=got.momentum).double()
    torch.testing.assert_close(got.state_dict()["running_var"], state_after(fresh, many, groups)["running_var"])


@pytest.mark.parametrize("restride", [lambda x: x[..., :2, 1:], lambda x: x.transpose(3, 4), lambda x: x[::2]])
def test_any_strides(restride: Callable[[Tensor], Tensor]):
    x = restride(clips(8))
    y = grouped(2)(x)
    torch.testing.assert_close(y, grouped(2)(x.contiguous()), **CLOSE)
    torch.testing.assert_close(y, torch.cat([strip_file_scheme()(x_i) for x_i in x.chunk(2)]), **CLOSE)


def test_gradcheck():
    bn = grouped(2)
    assert torch.autograd.gradcheck(
        lambda x, w, b: torch.func.functional_call(bn, {"weight": w, "bias": b}, x),
        (clips(4)[..., :1, :2].requires_grad_(), bn.weight.detach().requires_grad_(), bn.bias),
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_forward_pass_updates_running_statistics_by_the_formula(groups: int):
    bn, x = grouped(groups), clips(8)
    want = state_after(bn, x, groups)
    bn(x)
    torch.testing.assert_close(bn.state_dict(), want, **CLOSE)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_running_statistics_do_not_depend_on_micro_batches(micro_batches: int):
    x = clips(16)
    model = nn.Sequential(grouped(4 // micro_batches), nn.ReLU(inplace=True), grouped(4 // micro_batches))
    middle = torch.cat([nn.Sequential(grouped(1), nn.ReLU())(x_i) for x_i in x.chunk(4)])
    want = [state_after(model[0], x, 4), state_after(model[2], middle, 4)]
    with deferred_running_stats(model):
        for x_i in x.chunk(micro_batches):
            model(x_i).sum().backward()
        assert model[0].num_batches_tracked == 0
    for bn, state in zip((model[0], model[2]), want, strict=True):
        torch.testing.assert_close(bn.state_dict(), state, **CLOSE)


def test_a_layer_that_did_not_run_keeps_its_statistics():
    used, unused = grouped(2), grouped(2)
    before = {key: value.clone() for key, value in unused.state_dict().items()}
    with deferred_running_stats(nn.ModuleList([used, unused])):
        used(clips(4))
    assert used.num_batches_tracked == 1
    torch.testing.assert_close(unused.state_dict(), before, rtol=0, atol=0)


def test_a_failed_step_leaves_running_statistics_unchanged():
    bn = grouped(2)
    before = {key: value.clone() for key, value in bn.state_dict().items()}
    with pytest.raises(ValueError, match="5D"), deferred_running_stats(bn):
        bn(bn(clips(4))[0])
    torch.testing.assert_close(bn.state_dict(), before, rtol=0, atol=0)
    bn(clips(4))  # outside of the block, it updates immediately again
    assert bn.num_batches_tracked == 1


def test_variance_of_nearly_constant_channels_far_from_zero():
    x = 100 + 0.01 * clips(8, dtype=torch.float32)
    bn = grouped(2, torch.float32)
    bn.momentum = 1.0
    bn(x)
    chunks = x.double().unflatten(0, (2, -1))
    want = aggregate(chunks.mean((1, 3, 4, 5)), chunks.var((1, 3, 4, 5)))
    torch.testing.assert_close((bn.running_mean.double(), bn.running_var.double()), want, rtol=1e-3, atol=0)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_momentum_1_equals_precise_bn(momentum: float | None):
    want, got = (nn.Sequential(grouped(1), nn.ReLU(), grouped(1)) for _ in range(2))
    want[2].momentum = got[2].momentum = momentum
    batches = [clips(8, seed) for seed in range(3)]
    update_bn_stats(want, batches, num_iters=3)
    with torch.no_grad(), deferred_running_stats(got, momentum=1.0):
        for batch in batches:
            got(batch)
    middle = [nn.Sequential(grouped(1), nn.ReLU())(batch) for batch in batches]
    for i, inputs in ((0, batches), (2, middle)):
        torch.testing.assert_close(got[i].running_mean, want[i].running_mean, **CLOSE)
        # fvcore's variances within batches are biased; those of torch's running statistics are unbiased
        values = inputs[0].numel() / CHANNELS
        var_of_means = torch.stack([batch.mean((0, 2, 3, 4)) for batch in inputs]).var(0, correction=0)
        want_var = (want[i].running_var - var_of_means) * values / (values - 1) + var_of_means
        torch.testing.assert_close(got[i].running_var, want_var, **CLOSE)
    assert got[0].momentum == 0.3
    assert got[2].momentum == momentum


def test_deferred_statistics_take_no_more_memory_for_more_forwards():
    def tensors_after(forwards: int) -> int:
        bn = grouped(2)
        with torch.no_grad(), deferred_running_stats(bn):
            for seed in range(forwards):
                bn(clips(4, seed))
            return sum(type(item) is Tensor for item in gc.get_objects())

    assert tensors_after(100) <= tensors_after(20)
    many, few = grouped(2), grouped(50)
    with deferred_running_stats(many):
        for batch in clips(100).chunk(25):
            many(batch)
    with deferred_running_stats(few):
        few(clips(100))
    torch.testing.assert_close(many.state_dict(), few.state_dict(), **CLOSE)


def test_invalid_numbers_of_groups_raise_errors():
    bn = grouped(3)
    with pytest.raises(UserError, match="8 clips cannot be cut into 3 equal groups"):
        bn(clips(8))
    bn.eval()(clips(8))
    with pytest.raises(UserError, match="at least 1"):
        set_bn_groups(bn, 0)


class ForbidBatchCopies(TorchDispatchMode):
    """Fails if an operation copies or converts a whole batch of clips."""

    def __init__(self, batch: torch.Size):
        super().__init__()
        self.batch = batch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        copies = ("aten::clone", "aten::_to_copy", "aten::cat", "aten::contiguous")
        assert not (func.name() in copies and out.shape == self.batch), f"{func} copies the batch"
        return out


@pytest.mark.usefixtures("normalise_path")
@pytest.mark.parametrize("groups", [1, 2])
def test_autocast_in_channels_last_copies_nothing(groups: int):
    x = clips(4, dtype=torch.float32)
    want = step(grouped(groups, torch.float32), x)
    bn = grouped(groups, torch.float32)
    low = x.to(torch.bfloat16, memory_format=torch.channels_last_3d).requires_grad_()
    gradient = clips(4, seed=1).to(torch.bfloat16, memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", torch.bfloat16), ForbidBatchCopies(x.shape), deferred_running_stats(bn):
        y = bn(low)
        y.backward(gradient)
    assert y.dtype == low.grad.dtype == torch.bfloat16
    assert y.stride() == low.grad.stride() == low.stride()
    assert bn.weight.grad.dtype == bn.running_mean.dtype == torch.float32
    for got, expected in zip((y, low.grad, bn.weight.grad, bn.bias.grad), want, strict=True):
        torch.testing.assert_close(got.float(), expected, rtol=0.03, atol=0.03 * expected.abs().max().item())
    torch.testing.assert_close(
        bn.running_var, state_after(strip_file_scheme(torch.float32), x, groups)["running_var"], rtol=0.01, atol=0
    )


@pytest.mark.usefixtures("normalise_path")
@pytest.mark.parametrize("groups", [1, 2])
def test_compiles_into_one_graph(groups: int):
    model = nn.Sequential(grouped(groups), nn.ReLU(inplace=True), grouped(groups))
    torch._dynamo.reset()  # shapes that earlier tests compiled would make these dynamic, which a trainer never does
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    got, want = [], []
    for forward, results in ((compiled, got), (model, want)):
        model.zero_grad()
        model.load_state_dict(nn.Sequential(strip_file_scheme(), nn.ReLU(), strip_file_scheme()).state_dict())
        for seed in range(2):
            with deferred_running_stats(model):
                y = forward(clips(4, seed))
                (y * clips(4, 1)).sum().backward()
            results.append(y.detach())
        results += [p.grad.clone() for p in model.parameters()] + [b.clone() for b in model.buffers()]
    torch.testing.assert_close(got, want)


class CallRecorder(TorchDispatchMode):
    """Records every operation with its tensor arguments."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, list[Tensor]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func.name(), [arg for arg in args if isinstance(arg, Tensor)]))
        return func(*args, **(kwargs or {}))


def calls_of_a_step(groups: int) -> list[tuple[str, list[Tensor]]]:
    """Return the operations of a training step and an evaluation on the meta device, which uses the code for GPUs."""
    bn = grouped(groups, torch.float32).to("meta")
    x = torch.empty(8, 2, 3, 3, CHANNELS, device="meta", dtype=torch.bfloat16).permute(0, 4, 1, 2, 3).requires_grad_()
    with CallRecorder() as recorder:
        with deferred_running_stats(bn):
            bn(x).backward(torch.empty_like(x))
        bn.eval()(x)
    return recorder.calls


def test_more_groups_launch_no_more_kernels_on_a_gpu():
    two, eight = ([name for name, _ in calls_of_a_step(groups)] for groups in (2, 8))
    assert eight == two


@pytest.mark.parametrize("groups", [1, 2])
def test_kernels_get_channels_last_images(groups: int):
    for name, tensors in calls_of_a_step(groups):
        if "batch_norm" in name:
            maps = [tensor for tensor in tensors if tensor.dim() > 1]
            assert maps
            assert all(m.dim() == 4 and m.is_contiguous(memory_format=torch.channels_last) for m in maps), name


@pytest.mark.usefixtures("normalise_path")
@pytest.mark.parametrize("groups", [1, 2])
def test_a_following_inplace_relu_copies_no_gradient(groups: int):
    y = nn.functional.relu_(grouped(groups)(clips(4)))
    nodes, names = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [next_node for next_node, _ in node.next_functions if next_node is not None]
    assert "ReluBackward0" in names
    assert not names & {"CopySlices", "AsStridedBackward0"}


def few_channels() -> Tensor:
    return torch.randn(8, 4, 2, 32, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3


SPLITS = {"even": (4, 4), "uneven": (6, 2)}  # clips of each of two ranks


def rank_steps(rank: int, folder: Path) -> None:
    """Run one of two ranks: for each split of 8 clips, 1 and 2 groups that the ranks share; then groups of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    results = {}
    for name, split in SPLITS.items():
        rank_clips = clips(8).split(split)[rank]
        gradient = clips(8, seed=1).split(split)[rank]
        for groups in (1, 2):
            bn = grouped(1)
            set_bn_groups(bn, groups, dist.group.WORLD)
            x = rank_clips.clone(memory_format=LAYOUTS[groups - 1]).requires_grad_()
            with deferred_running_stats(bn):
                y = bn(x)
                y.backward(gradient)
            assert y.stride() == x.grad.stride() == x.stride()
            immediate = grouped(1)  # updates its running statistics in the forward pass
            set_bn_groups(immediate, groups, dist.group.WORLD)
            immediate(rank_clips)
            results[name, groups] = (
                y.detach(),
                x.grad,
                bn.weight.grad,
                bn.bias.grad,
                bn.state_dict(),
                immediate.state_dict(),
            )
    low = clips(8).chunk(2)[rank].to(torch.bfloat16, memory_format=torch.channels_last_3d).requires_grad_()
    bn = grouped(1, torch.float32)
    set_bn_groups(bn, 1, dist.group.WORLD)
    with torch.autocast("cpu", torch.bfloat16):
        y = bn(low)
    y.backward(clips(8, seed=1).chunk(2)[rank].to(torch.bfloat16))
    assert y.stride() == low.grad.stride() == low.stride()
    results["bfloat16"] = y.detach(), low.grad, bn.weight.grad, bn.bias.grad, bn.running_var
    few = few_channels().split((6, 2))[rank].to(memory_format=torch.channels_last_3d).requires_grad_()
    bn = convert_group_batchnorm(nn.BatchNorm3d(few.shape[1]).double())
    set_bn_groups(bn, 1, dist.group.WORLD)
    y = bn(few)
    y.backward(few_channels().flip(0).split((6, 2))[rank])
    results["few channels"] = y.detach(), few.grad, bn.weight.grad, bn.running_var
    bn = grouped((3, 1)[rank])
    with deferred_running_stats(bn):
        bn(clips(8).split((6, 2))[rank])
    results["own groups"] = bn.state_dict()
    bn = grouped(1)
    shared, own = clips(8).split(4)
    with deferred_running_stats(bn):
        set_bn_groups(bn, 1, dist.group.WORLD)
        bn(shared.chunk(2)[rank])
        set_bn_groups(bn, 1)
        bn(own.chunk(2)[rank])
    results["shared and own"] = bn.state_dict()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    start_fork_server(PRELOADED_MODULES)
    context = mp.start_processes(rank_steps, (folder,), nprocs=2, join=False, start_method="forkserver")
    try:
        while not context.join():
            pass
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("groups", [1, 2])
def test_shared_groups_equal_one_process(two_ranks: list[dict], split: str, groups: int):
    # The i-th chunk of a rank is its part of group i.
    parts = [torch.arange(8).split(SPLITS[split])[rank].chunk(groups) for rank in range(2)]
    order = torch.cat([part for group in zip(*parts, strict=True) for part in group])
    inverse = order.argsort()
    x = clips(8)[order].requires_grad_()
    bn = grouped(groups)
    y = bn(x)
    y.backward(clips(8, seed=1)[order])
    got_y, got_dx, dweight, dbias, *states = zip(*(results[split, groups] for results in two_ranks), strict=True)
    assert sum(map(len, got_y)) == 8
    torch.testing.assert_close((torch.cat(got_y), torch.cat(got_dx)), (y.detach()[inverse], x.grad[inverse]), **CLOSE)
    torch.testing.assert_close((sum(dweight), sum(dbias)), (bn.weight.grad, bn.bias.grad), **CLOSE)
    want = state_after(strip_file_scheme(), clips(8)[order], groups)
    for state in (state for pair in states for state in pair):
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(state[name], want[name], **CLOSE)


def test_shared_groups_in_bfloat16(two_ranks: list[dict]):
    y, dx, dweight, dbias, running_var = zip(*(results["bfloat16"] for results in two_ranks), strict=True)
    got = torch.cat(y), torch.cat(dx), sum(dweight), sum(dbias)
    assert [t.dtype for t in got] == 2 * [torch.bfloat16] + 2 * [torch.float32]
    for actual, want in zip(got, step(grouped(1), clips(8)), strict=True):
        torch.testing.assert_close(actual.double(), want, rtol=0.03, atol=0.03 * want.abs().max().item())
    want = state_after(strip_file_scheme(), clips(8), 1)["running_var"].float()
    torch.testing.assert_close(running_var, (want, want), rtol=0.01, atol=0)


def test_shared_groups_of_few_channels(two_ranks: list[dict]):
    y, dx, dweight, running_var = zip(*(rank["few channels"] for rank in two_ranks), strict=True)
    x, bn = few_channels().requires_grad_(), nn.BatchNorm3d(4).double()
    want = bn(x)
    want.backward(few_channels().flip(0))
    want_var = state_after(nn.BatchNorm3d(4).double(), x.detach(), 1)["running_var"]
    got = torch.cat(y), torch.cat(dx), sum(dweight), running_var[0]
    torch.testing.assert_close(got, (want.detach(), x.grad, bn.weight.grad, want_var), rtol=1e-9, atol=1e-9)


def test_running_statistics_do_not_depend_on_ranks(two_ranks: list[dict]):
    want = state_after(strip_file_scheme(), clips(8), 4)
    for results in two_ranks:
        torch.testing.assert_close(results["own groups"], want, **CLOSE)


def test_a_group_that_two_ranks_share_counts_once(two_ranks: list[dict]):
    groups = clips(8).split((4, 2, 2))
    moments = [torch.stack([(g.mean((0, 2, 3, 4)), g.var((0, 2, 3, 4)))[i] for g in groups]) for i in range(2)]
    for results in two_ranks:
        for name, value in zip(("running_mean", "running_var"), aggregate(*moments), strict=True):
            want = 0.7 * strip_file_scheme().state_dict()[name] + 0.3 * value
            torch.testing.assert_close(results["shared and own"][name], want, **CLOSE)


def test_sums_keep_their_address_as_cuda_graphs_require():
    model = nn.Sequential(grouped(2), grouped(1))
    addresses = []
    for _ in range(2):
        with deferred_running_stats(model):
            model(clips(4))
            addresses.append([layer.deferred_sums.data_ptr() for layer in model])
    assert addresses[0] == addresses[1]
    model.float()
    with deferred_running_stats(model):
        assert {layer.deferred_sums.dtype for layer in model} == {torch.float64}, "sums of squares need float64"
    assert model.state_dict().keys() == nn.Sequential(strip_file_scheme(), strip_file_scheme()).state_dict().keys()
