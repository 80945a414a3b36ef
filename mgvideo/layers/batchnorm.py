"""Batch normalisation over groups of clips, with the same results on any number of ranks and micro-batches.

Each clip is normalised with the statistics of its group: consecutive clips of the batch, which may be a part of a
rank's batch or spread over several ranks.

1. `convert_group_batchnorm` converts a model's layers, once, before DDP and torch.compile.
2. `set_bn_groups` sets the groups before each forward pass.
3. `deferred_running_stats` wraps a training step.

Turn off DDP's `broadcast_buffers`: every rank computes the same running statistics.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mgvideo.errors import UserError

aten = torch.ops.aten
MAX_DEFERRED_FORWARDS = 16  # forward passes whose statistics a layer keeps before it adds them to its sums


class GroupBatchNorm3d(nn.BatchNorm3d):
    """`nn.BatchNorm3d` with statistics per group of clips; parameters, buffers and evaluation are the same.

    In training, a batch `[n, channels, t, h, w]` is split along n into `groups` chunks of equal size. With a process
    group, the i-th chunks of all its ranks form one BN group; the ranks may hold different numbers of clips.
    """

    running_mean: Tensor  # like the next two, None without track_running_stats
    running_var: Tensor
    num_batches_tracked: Tensor
    groups: int = 1
    process_group: dist.ProcessGroup | None = None
    # Inside deferred_running_stats: sums over the groups so far (see `_sums`), and statistics of the forward passes not
    # yet added to them. The sums are the same tensor in every step, as CUDA graphs require.
    deferring: bool = False
    deferred_sums: Tensor
    deferred_forwards: list[_Statistics]

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `[n, channels, t, h, w]`.

        Raises:
            UserError: in training, if n is not a multiple of `groups`.
        """
        super()._check_input_dim(input)
        output = self._normalise(input.flatten(2, 3))
        # _unsafe_view: autograd does not treat the result as a view, of which an in-place ReLU would copy the gradient.
        return aten._unsafe_view(output, input.shape)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept the 4-D view that `_normalise` passes to `nn.BatchNorm3d.forward`; `forward` checks the input."""

    def _normalise(self, input: Tensor) -> Tensor:
        """Normalise `[n, channels, t · h, w]`.

        CUDA has fast kernels for channels_last only, and this view of a channels_last_3d tensor is channels_last.
        """
        single_group = self.groups == 1 and self.process_group is None
        if not self.training or (single_group and not self.deferring):
            return super().forward(input)
        if input.shape[0] % self.groups:
            raise UserError(
                f"batch norm: {input.shape[0]} clips cannot be cut into {self.groups} equal groups; "
                "make the (micro-)batch of every rank a multiple of its number of groups"
            )
        fold = _fold(input, self.groups)
        if self.process_group is not None or fold > 1:
            output, mean, var = _MergedNormalise.apply(
                input, self.weight, self.bias, self.groups, fold, self.eps, self.process_group
            )
            statistics = _Statistics(mean, var, _num_ranks(self.process_group))
        elif self.groups > 1:
            normalise = _CpuGroupNormalise if input.device.type == "cpu" else _GpuGroupNormalise
            output, mean, invstd = normalise.apply(input, self.weight, self.bias, self.groups, self.eps)
            statistics = _Statistics(mean, invstd, size=input.numel() // mean.numel(), eps=self.eps)
        else:
            # With momentum 1, the kernel writes the statistics of this batch into its running statistics.
            mean, var = torch.zeros((2, 1, self.num_features), dtype=_stats_dtype(input), device=input.device)
            output = F.batch_norm(input, mean[0], var[0], self.weight, self.bias, True, 1.0, self.eps)
            statistics = _Statistics(mean, var)
        if not self.deferring:
            if self.track_running_stats:
                _update_running([self], _sums(statistics))
        elif torch.compiler.is_compiling():  # compiled code fuses the additions, so keep nothing
            self.deferred_sums.add_(_sums(statistics))
        else:
            self.deferred_forwards.append(statistics)
            if len(self.deferred_forwards) == MAX_DEFERRED_FORWARDS:
                _add_deferred([self])
        return output


def convert_group_batchnorm(model: nn.Module) -> nn.Module:
    """Turn every `nn.BatchNorm3d` of a model into a `GroupBatchNorm3d`, in place, and return the model.

    The modules, their parameters, buffers and hooks stay the same objects. Layers that normalise each clip by itself,
    such as `nn.LayerNorm`, `nn.GroupNorm` and `nn.InstanceNorm3d`, stay unchanged.

    Raises:
        UserError: names a layer whose statistics would not be synchronised, and what to use instead.
    """
    for name, module in model.named_modules():
        if type(module) is nn.BatchNorm3d:
            module.__class__ = GroupBatchNorm3d
        elif advice := _replacement_advice(module):
            raise UserError(
                f"model: {name or 'the network itself'} ({type(module).__name__}) would have other statistics on each "
                f"rank and in each micro-batch: {advice}"
            )
    return model


def _replacement_advice(module: nn.Module) -> str | None:
    """Return what to use instead of a layer that cannot be converted; None for any other layer."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return "set its track_running_stats to False" if module.track_running_stats else None
    if not isinstance(module, nn.modules.batchnorm._BatchNorm) or isinstance(module, GroupBatchNorm3d):
        return None
    if isinstance(module, nn.LazyBatchNorm3d):
        return "use nn.BatchNorm3d with its number of channels"
    if isinstance(module, nn.BatchNorm3d | nn.SyncBatchNorm):
        return "use nn.BatchNorm3d itself, whose groups of clips are shared among ranks automatically"
    return "use nn.BatchNorm3d on [clips, channels, frames, height, width], with dimensions of size 1 where needed"


def set_bn_groups(model: nn.Module, groups: int, process_group: dist.ProcessGroup | None = None) -> None:
    """Set the BN groups of all later training forwards: `groups` chunks, each shared by the ranks of `process_group`.

    Raises:
        UserError: `groups` is below 1.
    """
    if groups < 1:
        raise UserError(f"batch norm: {groups} groups of clips; there must be at least 1")
    if process_group is not None and dist.get_world_size(process_group) == 1:
        process_group = None
    for module in _layers(model):
        module.groups, module.process_group = groups, process_group


@contextmanager
def deferred_running_stats(
    model: nn.Module, world_group: dist.ProcessGroup | None = None, momentum: float | None = None
) -> Iterator[None]:
    """Update the running statistics once for all training forwards inside the block, over all ranks.

    Every BN group of every forward pass and rank has the same weight. The statistics accumulate on the device, in
    memory that does not grow with the number of forward passes. At the end of the block, one all-reduce covers all
    layers. An exception leaves the running statistics unchanged.

    Args:
        world_group: ranks to reduce over; all by default. Without torch.distributed there is no all-reduce.
        momentum: replaces the momentum of the layers. With 1, the running statistics become exactly those of the
            forward passes inside: precise BN (Wu and Johnson 2021, arXiv 2105.07576, section 3).
    """
    layers = [layer for layer in _layers(model) if layer.training and layer.track_running_stats]
    for layer in layers:
        sums, device = getattr(layer, "deferred_sums", None), layer.running_mean.device
        if sums is None or (sums.dtype, sums.device) != (torch.float64, device):  # missing, or changed by model.to()
            sums = torch.zeros((4, layer.num_features), dtype=torch.float64, device=device)
            layer.register_buffer("deferred_sums", sums, persistent=False)
        layer.deferring, layer.deferred_forwards = True, []
    if layers:
        torch._foreach_zero_([layer.deferred_sums for layer in layers])
    try:
        yield
        if layers:
            _add_deferred(layers)
            sums = torch.cat([layer.deferred_sums for layer in layers], dim=1)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(sums, group=world_group)
            _update_running(layers, sums, momentum)
    finally:
        for layer in layers:
            layer.deferring, layer.deferred_forwards = False, []


def _layers(model: nn.Module) -> list[GroupBatchNorm3d]:
    return [module for module in model.modules() if isinstance(module, GroupBatchNorm3d)]


def _stats_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Statistics(NamedTuple):
    """Statistics of one forward pass: mean and spread of each group. Each of the `ranks` that share a group has a part.

    `spread` holds unbiased variances if `size` is 0. Otherwise it holds inverse standard deviations as the kernel
    computes them from `size` values with `eps`.
    """

    mean: Tensor  # [groups, channels]
    spread: Tensor  # [groups, channels]
    ranks: int = 1
    size: int = 0
    eps: float = 0.0


def _sums(statistics: _Statistics) -> Tensor:
    """Sum mean, mean², variance and 1 over groups: float64 `[4, channels]`.

    Each of the ranks that share a group contributes an equal part. float64 keeps the variance of the means precise,
    which is later computed as the mean of squares minus the square of the mean.
    """
    mean, var = statistics.mean.double(), statistics.spread.double()
    if statistics.size:
        var = (var.pow(-2) - statistics.eps).clamp(min=0) * (statistics.size / (statistics.size - 1))
    return torch.stack((mean, mean.square(), var, torch.ones_like(mean))).sum(1) / statistics.ranks


@torch.no_grad()
def _add_deferred(layers: Sequence[GroupBatchNorm3d]) -> None:
    """Add the statistics of the layers' deferred forward passes to their sums.

    First joins the forward passes of each layer, then the layers with the same number of groups: the tensors are so
    small that the number of calls determines the time.
    """
    layers_by_kind = defaultdict(list)  # by number of groups and (ranks, size, eps)
    for layer in layers:
        forwards_by_kind = defaultdict(list)  # by (ranks, size, eps)
        for statistics in layer.deferred_forwards:
            forwards_by_kind[statistics[2:]].append(statistics)
        for kind, forwards in forwards_by_kind.items():
            mean = torch.cat([statistics.mean for statistics in forwards])
            spread = torch.cat([statistics.spread for statistics in forwards])
            layers_by_kind[len(mean), kind].append((layer.deferred_sums, mean, spread))
        layer.deferred_forwards = []
    for (_, kind), same_kind in layers_by_kind.items():
        sums, means, spreads = zip(*same_kind, strict=True)
        statistics = _Statistics(torch.cat(means, dim=1), torch.cat(spreads, dim=1), *kind)
        torch._foreach_add_(list(sums), _sums(statistics).split([mean.shape[1] for mean in means], dim=1))


@torch.no_grad()
def _update_running(layers: Sequence[GroupBatchNorm3d], sums: Tensor, momentum: float | None = None) -> None:
    """Move the running mean towards the mean of the groups' means, and the running variance towards the mean of their
    variances plus the variance of their means.

    `sums` holds the `_sums` of the layers side by side; `momentum` replaces theirs. A layer that did not run keeps its
    statistics.
    """
    count = sums[3]
    mean, square, var = sums[:3] / torch.where(count > 0, count, 1)
    var = var + (square - mean.square())
    dtype, sizes = layers[0].running_mean.dtype, [layer.num_features for layer in layers]
    means, variances, ran = (flat.to(dtype).split(sizes) for flat in (mean, var, count > 0))
    torch._foreach_add_([layer.num_batches_tracked for layer in layers], [part[0] > 0 for part in ran])
    momenta = [layer.momentum if momentum is None else momentum for layer in layers]
    weights = torch._foreach_mul(ran, [1.0 if value is None else value for value in momenta])
    for layer, weight, value in zip(layers, weights, momenta, strict=True):
        if value is None:  # momentum=None of nn.BatchNorm3d: the plain average of all updates
            weight /= layer.num_batches_tracked.clamp(min=1)
    torch._foreach_lerp_([layer.running_mean for layer in layers], means, weights)
    torch._foreach_lerp_([layer.running_var for layer in layers], variances, weights)


def _dense(x: Tensor, like: Tensor) -> Tensor:
    """Return x, copied if needed, in channels_last if `like` is, otherwise contiguous: CPU kernels need one layout."""
    channels_last = like.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


class _CpuGroupNormalise(torch.autograd.Function):
    """Normalises groups within one rank on a CPU: runs torch's kernels group by group, into one output.

    Returns the output, and the groups' means and inverse standard deviations `[groups, channels]`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = _dense(x, like=x)
        y = torch.empty_like(x)
        mean = x.new_empty((groups, x.shape[1]), dtype=_stats_dtype(x))
        invstd = torch.empty_like(mean)  # its own tensor: torch.compile of torch 2.11 cannot trace views here
        for x_i, y_i, mean_i, invstd_i in zip(x.chunk(groups), y.chunk(groups), mean, invstd, strict=True):
            aten._native_batch_norm_legit.no_stats_out(
                x_i, weight, bias, True, 0.0, eps, out=y_i, save_mean=mean_i, save_invstd=invstd_i
            )
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, invstd)
        ctx.set_materialize_grads(False)  # otherwise autograd allocates zero gradients for these two
        return y, mean, invstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        x, weight, mean, invstd = ctx.saved_tensors
        dy = _dense(dy, like=x)
        groups, affine = len(mean), weight is not None
        dx = torch.empty_like(x)
        dweights, dbiases = [], []
        for x_i, dy_i, dx_i, mean_i, invstd_i in zip(
            x.chunk(groups), dy.chunk(groups), dx.chunk(groups), mean, invstd, strict=True
        ):
            gradient, dweight, dbias = aten.native_batch_norm_backward.default(
                dy_i, x_i, weight, None, None, mean_i, invstd_i, True, ctx.eps, (True, affine, affine)
            )
            dx_i.copy_(gradient)
            dweights.append(dweight)
            dbiases.append(dbias)
        if not affine:
            return dx, None, None, None, None
        return dx, torch.stack(dweights).sum(0), torch.stack(dbiases).sum(0), None, None


class _GpuGroupNormalise(torch.autograd.Function):
    """Normalises groups within one rank on a GPU: each kernel covers all groups, since launches cost more than work.

    Returns the output, and the groups' means and inverse standard deviations `[groups, channels]`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = _dense(x, like=x)
        clips = _by_group(x, groups)
        # Both reductions read bf16 or fp16 directly and accumulate in float32.
        mean = clips.mean((1, 3), dtype=_stats_dtype(x))
        var = torch.var(clips, (1, 3), correction=0, out=torch.empty_like(mean))
        invstd = var.add_(eps).rsqrt_()
        scale = invstd if weight is None else invstd * weight
        shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
        y = torch.empty_like(x)
        torch.addcmul(_per_channel(shift), clips, _per_channel(scale), out=_by_group(y, groups))
        ctx.save_for_backward(x, mean, invstd, scale)
        ctx.affine = weight is not None
        ctx.mark_non_differentiable(mean, invstd)
        ctx.set_materialize_grads(False)  # otherwise autograd allocates zero gradients for these two
        return y, mean, invstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        x, mean, invstd, scale = ctx.saved_tensors
        clips, gradients = _by_group(x, len(mean)), _by_group(_dense(dy, like=x), len(mean))
        per_value = mean.numel() / x.numel()  # 1 / number of values of a group in a channel
        sum_dy = gradients.sum((1, 3), dtype=mean.dtype)
        # The float32 offset makes the products float32 too: rounded to bf16, they would add up to noise.
        centre = (mean * sum_dy).mul_(-per_value)
        sum_dy_xhat = torch.addcmul(_per_channel(centre), clips, gradients).sum((1, 3)).mul_(invstd)
        # dx = scale · (dy − mean(dy) − x̂ · mean(dy · x̂)): scale · dy plus an affine map of x
        mean_scale = scale * -per_value
        slope = mean_scale * invstd * sum_dy_xhat
        offset = torch.addcmul(mean_scale * sum_dy, slope, mean, value=-1)
        dx = torch.empty_like(x)
        dclips = _by_group(dx, len(mean))
        torch.addcmul(_per_channel(offset), clips, _per_channel(slope), out=dclips)
        torch.addcmul(dclips, gradients, _per_channel(scale), out=dclips)
        if not ctx.affine:
            return dx, None, None, None, None
        return dx, sum_dy_xhat.sum(0), sum_dy.sum(0), None, None


def _by_group(x: Tensor, groups: int) -> Tensor:
    """Return the view `[groups, clips, channels, positions]` of a dense x."""
    return x.unflatten(0, (groups, -1)).flatten(3)


def _per_channel(values: Tensor) -> Tensor:
    """Reshape `[groups, channels]` so that it broadcasts against `_by_group`."""
    return values[:, None, :, None]


def _fold(x: Tensor, groups: int) -> int:
    """Return how many neighbouring positions to treat as extra channels, so that few channels fill a CPU's registers.

    On two cores, torch's channels_last kernels take 5 to 9 ns a value for 8 channels and 0.6 ns for 32 (bf16, forward
    and backward).
    """
    channels, values = x.shape[1], x.numel() // groups
    layout = x.is_contiguous(memory_format=torch.channels_last)
    if x.device.type != "cpu" or not layout or channels >= 16 or values < 2**14:
        return 1  # folding is not faster
    return math.gcd(32 // channels, values // channels)


def _parts(x: Tensor, groups: int, fold: int) -> Sequence[Tensor]:
    """Return views of the groups of x: `[n / groups, channels, t · h, w]`; folded, `[1, fold · channels, …, 1]`."""
    if fold == 1:
        return x.chunk(groups)
    return x.movedim(1, -1).view(groups, 1, -1, 1, fold * x.shape[1]).movedim(-1, 2).unbind()


def _folded(fold: int, *maps: Any) -> list[Any]:
    """Repeat values per channel `[…, channels]` for each position that is folded into channels; None stays None."""
    return [t if t is None or fold == 1 else t.repeat(*[1] * (t.dim() - 1), fold) for t in maps]


def _num_ranks(process_group: dist.ProcessGroup | None) -> int:
    return 1 if process_group is None else dist.get_world_size(process_group)


class _MergedNormalise(torch.autograd.Function):
    """Normalises groups whose statistics are merged from parts: of several ranks, or of positions folded into channels.

    Runs one collective operation in forward and one in backward if there is a process group. Returns the output for
    this rank's part, and the means and unbiased variances of the whole groups, `[groups, channels]`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int,
        fold: int,
        eps: float,
        process_group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, dtype = _dense(x, like=x), _stats_dtype(x)
        parts = _parts(x, groups, fold)
        # The kernel computes in the dtype of the running statistics it gets; momentum 0 leaves these unchanged.
        zeros = x.new_zeros(fold * x.shape[1], dtype=dtype)
        stats = [torch.stack(torch.batch_norm_update_stats(part, zeros, zeros, 0.0)) for part in parts]
        means, variances = torch.stack(stats, 1).double().unflatten(2, (fold, -1))
        mean = means.mean(1)
        var = (variances + (means - mean[:, None]).square()).mean(1)
        mean, var, size = _merge(mean, var, x.numel() // mean.numel(), process_group)
        unbiased = var * (size / (size - 1))
        mean, var = mean.to(dtype), var.to(dtype)
        ctx.save_for_backward(x, weight, mean, var, size)
        ctx.fold, ctx.eps, ctx.process_group = fold, eps, process_group
        ctx.mark_non_differentiable(mean, unbiased)
        ctx.set_materialize_grads(False)
        y = torch.empty_like(x)
        weight, bias, mean_f, var_f = _folded(fold, weight, bias, mean, var)
        for part, y_i, mean_i, var_i in zip(parts, _parts(y, groups, fold), mean_f, var_f, strict=True):
            _affine(part, mean_i, var_i, eps, weight, bias, out=y_i)
        return y, mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        x, weight, mean, var, size = ctx.saved_tensors
        groups, fold = len(mean), ctx.fold
        gain = torch.ones_like(mean[0]) if weight is None else weight
        x_parts, dy_parts = (_parts(tensor, groups, fold) for tensor in (x, _dense(dy, like=x)))
        gain_f, mean_f, var_f = _folded(fold, gain, mean, var)
        scaled, sums = [], []  # dy · scale; sums of dy·x̂ and of dy
        unused = mean.new_empty(0)  # saved statistics: CUDA's kernels require a tensor although they do not read it
        for x_i, dy_i, mean_i, var_i in zip(x_parts, dy_parts, mean_f, var_f, strict=True):
            gradient, *part_sums = aten.native_batch_norm_backward.default(
                dy_i, x_i, gain_f, mean_i, var_i, unused, unused, False, ctx.eps, (True, True, True)
            )
            scaled.append(gradient)
            sums.append(torch.stack(part_sums))
        rank_sums = torch.stack(sums, 1).unflatten(2, (fold, -1)).sum(2)
        group_sums = rank_sums.clone()
        if ctx.process_group is not None:
            dist.all_reduce(group_sums, group=ctx.process_group)
        # dx = scale · (dy − x̂ · mean(dy·x̂) − mean(dy)): scale · dy plus an affine map of x̂
        maps = _folded(fold, *(-(var + ctx.eps).rsqrt() * gain * group_sums / size).to(mean.dtype))
        dx = torch.empty_like(x)
        for dx_i, x_i, scaled_i, mean_i, var_i, slope, offset in zip(
            _parts(dx, groups, fold), x_parts, scaled, mean_f, var_f, *maps, strict=True
        ):
            _affine(x_i, mean_i, var_i, ctx.eps, slope, offset, out=dx_i).add_(scaled_i)
        dweight, dbias = rank_sums.sum(1) if weight is not None else (None, None)
        return dx, dweight, dbias, None, None, None, None


def _merge(
    mean: Tensor, var: Tensor, size: int, process_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge means, biased variances and sizes of the ranks' parts of groups, all float64 `[groups, channels]`.

    Sizes are numbers of values per channel. Variances merge around the common mean (Chan, Golub and LeVeque 1979).
    """
    part = torch.stack((mean, var, torch.full_like(mean, size)))
    if process_group is None:
        return part.unbind()  # type: ignore[return-value]
    ranks = dist.get_world_size(process_group)
    parts = part.new_empty(ranks * part.numel())
    dist.all_gather_into_tensor(parts, part.flatten(), group=process_group)
    means, variances, sizes = parts.view(ranks, *part.shape).unbind(1)
    total = sizes.sum(0)
    mean = (sizes * means).sum(0) / total
    var = (sizes * (variances + (means - mean).square())).sum(0) / total
    return mean, var, total


def _affine(
    x: Tensor, mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None, out: Tensor
) -> Tensor:
    """Compute (x − mean) / √(var + eps) · weight + bias in one pass, into `out` of x's dtype and memory format."""
    # CUDA's kernels write to these two, so they must not share memory.
    save_mean, save_invstd = mean.new_empty(0), mean.new_empty(0)
    return aten.native_batch_norm.out(
        x, weight, bias, mean, var, False, 0.0, eps, out=out, save_mean=save_mean, save_invstd=save_invstd
    )[0]
