"""Batch normalisation over groups of clips, whatever the number of ranks and micro-batches that share a batch.

A clip's statistics come from its group: a run of clips, contiguous along the batch, that may be a part of a rank's
batch or spread over several ranks. `convert_group_batchnorm` makes a model's layers able to do so, once, before DDP
and torch.compile; `set_bn_groups` regroups them at a phase's start; `deferred_running_stats` wraps a training step.
Turn DDP's `broadcast_buffers` off: every rank computes the same running statistics.
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
MAX_DEFERRED_FORWARDS = 16  # statistics that a layer keeps before it adds them up


class GroupBatchNorm3d(nn.BatchNorm3d):
    """`nn.BatchNorm3d` with statistics per group of clips; parameters, buffers and evaluation are the same.

    In training a batch `[n, channels, t, h, w]` is cut along n into `groups` equal runs. With a process group, the
    i-th runs of all its ranks are one group; the ranks may hold different numbers of clips.
    """

    running_mean: Tensor  # None, as the two below, without track_running_stats
    running_var: Tensor
    num_batches_tracked: Tensor
    groups: int = 1
    process_group: dist.ProcessGroup | None = None
    # Inside deferred_running_stats: sums over the groups so far, see `_sums`, and the forwards not yet added to them.
    # The sums are the same tensor in every step, as CUDA graphs require.
    deferring: bool = False
    deferred_sums: Tensor
    deferred_forwards: list[_Statistics]

    def forward(self, input: Tensor) -> Tensor:
        """Normalises `[n, channels, t, h, w]`; in training n must be a multiple of `groups`, or UserError."""
        super()._check_input_dim(input)
        output = self._normalise(input.flatten(2, 3))
        # Not a view for autograd: an in-place ReLU on a view would copy the gradient of its base.
        return aten._unsafe_view(output, input.shape)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accepts the 4-D view that `forward` makes of an input which it has checked itself."""

    def _normalise(self, input: Tensor) -> Tensor:
        """Normalises `[n, channels, t · h, w]`.

        Of a channels_last_3d tensor this view is channels_last, and only for that CUDA has fast kernels.
        """
        alone = self.groups == 1 and self.process_group is None
        if not self.training or (alone and not self.deferring):
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
            statistics = _Statistics(mean, var, _ranks(self.process_group))
        elif self.groups > 1:
            normalise = _GroupNormalise if input.device.type == "cpu" else _GroupNormaliseAtOnce
            output, mean, invstd = normalise.apply(input, self.weight, self.bias, self.groups, self.eps)
            statistics = _Statistics(mean, invstd, size=input.numel() // mean.numel(), eps=self.eps)
        else:
            # With momentum 1, running statistics become the batch's own.
            mean, var = torch.zeros((2, 1, self.num_features), dtype=_stats_dtype(input), device=input.device)
            output = F.batch_norm(input, mean[0], var[0], self.weight, self.bias, True, 1.0, self.eps)
            statistics = _Statistics(mean, var)
        if not self.deferring:
            if self.track_running_stats:
                _update_running([self], _sums(statistics))
        elif torch.compiler.is_compiling():  # which fuses what it traces
            self.deferred_sums.add_(_sums(statistics))
        else:
            self.deferred_forwards.append(statistics)
            if len(self.deferred_forwards) == MAX_DEFERRED_FORWARDS:
                _add_deferred([self])
        return output


def convert_group_batchnorm(model: nn.Module) -> nn.Module:
    """Turn every `nn.BatchNorm3d` of a model into a `GroupBatchNorm3d`, in place, and return the model.

    The modules, their parameters, buffers and hooks stay the very same objects. Layers that normalise each clip by
    itself, such as `nn.LayerNorm`, `nn.GroupNorm` and `nn.InstanceNorm3d`, stay as they are.

    Raises:
        UserError: a layer whose statistics would not be synchronised, and what to use instead.
    """
    for name, module in model.named_modules():
        if type(module) is nn.BatchNorm3d:
            module.__class__ = GroupBatchNorm3d
        elif instead := _instead(module):
            raise UserError(
                f"model: {name or 'the network itself'} ({type(module).__name__}) would have other statistics on each "
                f"rank and in each micro-batch: {instead}"
            )
    return model


def _instead(module: nn.Module) -> str | None:
    """What to use instead of a layer that cannot be converted; None for any other layer."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return "set its track_running_stats to False" if module.track_running_stats else None
    if not isinstance(module, nn.modules.batchnorm._BatchNorm) or isinstance(module, GroupBatchNorm3d):
        return None
    if isinstance(module, nn.LazyBatchNorm3d):
        return "use nn.BatchNorm3d with its number of channels"
    if isinstance(module, nn.BatchNorm3d | nn.SyncBatchNorm):
        return "use nn.BatchNorm3d itself, whose groups of clips are shared among ranks without more"
    return "use nn.BatchNorm3d on [clips, channels, frames, height, width], of size 1 where there is none of these"


def set_bn_groups(model: nn.Module, groups: int, process_group: dist.ProcessGroup | None = None) -> None:
    """From now on, training cuts each batch into `groups` runs, each shared with the ranks of `process_group`."""
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
    """Make all training forwards inside it one update of the running statistics, over all ranks.

    Every BN group of every forward and rank has the same weight. Forwards accumulate on the device, in memory that does
    not grow with their number; on leaving, one all-reduce (over `world_group`, by default every rank; none without
    torch.distributed) covers all layers. `momentum` takes the place of the layers' own: with 1 the running statistics
    become those of the forwards inside, which is precise BN (Wu and Johnson 2021, arXiv 2105.07576, section 3). After
    an exception the running statistics are as before.
    """
    layers = [layer for layer in _layers(model) if layer.training and layer.track_running_stats]
    for layer in layers:
        sums, device = getattr(layer, "deferred_sums", None), layer.running_mean.device
        if sums is None or (sums.dtype, sums.device) != (torch.float64, device):  # none yet, or model.to() changed it
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
    """Statistics of one forward: the groups' means and spreads, `[groups, channels]`; each of `ranks` has a part.

    `spread` holds unbiased variances or, where `size` is given, inverse standard deviations as the kernel computes
    them from `size` values and `eps`.
    """

    mean: Tensor
    spread: Tensor
    ranks: int = 1
    size: int = 0
    eps: float = 0.0


def _sums(statistics: _Statistics) -> Tensor:
    """Sum mean, mean², variance and 1 over groups: float64 `[4, channels]`.

    Each of the ranks that share a group counts its part of it. In float64 a mean of squares may lose the square of
    the mean and still be precise.
    """
    mean, var = statistics.mean.double(), statistics.spread.double()
    if statistics.size:
        var = (var.pow(-2) - statistics.eps).clamp(min=0) * (statistics.size / (statistics.size - 1))
    return torch.stack((mean, mean.square(), var, torch.ones_like(mean))).sum(1) / statistics.ranks


@torch.no_grad()
def _add_deferred(layers: Sequence[GroupBatchNorm3d]) -> None:
    """Add the layers' deferred forwards to their sums.

    Forwards of one layer, and then layers of as many groups, are added at once: the tensors are so small that the time
    is that of the calls.
    """
    alike = defaultdict(list)  # by groups, and (ranks, size, eps)
    for layer in layers:
        forwards = defaultdict(list)
        for statistics in layer.deferred_forwards:
            forwards[statistics[2:]].append(statistics)
        for kind, several in forwards.items():
            mean = torch.cat([statistics.mean for statistics in several])
            spread = torch.cat([statistics.spread for statistics in several])
            alike[len(mean), kind].append((layer.deferred_sums, mean, spread))
        layer.deferred_forwards = []
    for (_, kind), several_layers in alike.items():
        sums, means, spreads = zip(*several_layers, strict=True)
        statistics = _Statistics(torch.cat(means, dim=1), torch.cat(spreads, dim=1), *kind)
        torch._foreach_add_(list(sums), _sums(statistics).split([mean.shape[1] for mean in means], dim=1))


@torch.no_grad()
def _update_running(layers: Sequence[GroupBatchNorm3d], sums: Tensor, momentum: float | None = None) -> None:
    """Move running statistics to the mean of means, and to the mean of variances plus the variance of means.

    `sums` holds the layers' `_sums` side by side; `momentum` takes the place of their own. A layer that no group went
    through keeps its statistics.
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
        if value is None:  # torch keeps the plain average of all updates
            weight /= layer.num_batches_tracked.clamp(min=1)
    torch._foreach_lerp_([layer.running_mean for layer in layers], means, weights)
    torch._foreach_lerp_([layer.running_var for layer in layers], variances, weights)


def _dense(x: Tensor, like: Tensor) -> Tensor:
    """x itself where it is channels_last or contiguous as `like` is, or a copy: the CPU kernels need one layout."""
    last = like.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


class _GroupNormalise(torch.autograd.Function):
    """Groups within one rank on a CPU: torch's kernels, group by group, into one output.

    Returns the output, and the groups' means and inverse standard deviations `[groups, channels]`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = _dense(x, like=x)
        y = torch.empty_like(x)
        mean = x.new_empty((groups, x.shape[1]), dtype=_stats_dtype(x))
        invstd = torch.empty_like(mean)  # not both in one: torch.compile of torch 2.11 traces no views of it
        for x_i, y_i, mean_i, invstd_i in zip(x.chunk(groups), y.chunk(groups), mean, invstd, strict=True):
            aten._native_batch_norm_legit.no_stats_out(
                x_i, weight, bias, True, 0.0, eps, out=y_i, save_mean=mean_i, save_invstd=invstd_i
            )
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, invstd)
        ctx.set_materialize_grads(False)  # of these two they would be zeros, made in every step
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


class _GroupNormaliseAtOnce(torch.autograd.Function):
    """Groups within one rank on a GPU: all of them in each kernel, since a kernel's launch costs more than its work.

    Returns the output, and the groups' means and inverse standard deviations `[groups, channels]`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = _dense(x, like=x)
        clips = _by_group(x, groups)
        # Both reductions read bf16 and fp16 as they are and add up in float32.
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
        ctx.set_materialize_grads(False)  # of these two they would be zeros, made in every step
        return y, mean, invstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        x, mean, invstd, scale = ctx.saved_tensors
        clips, gradients = _by_group(x, len(mean)), _by_group(_dense(dy, like=x), len(mean))
        share = mean.numel() / x.numel()  # one over the values of a group in a channel
        sum_dy = gradients.sum((1, 3), dtype=mean.dtype)
        # The mean in float32 makes the products float32 as well: rounded to bf16, they would add up to noise.
        centre = (mean * sum_dy).mul_(-share)
        sum_dy_xhat = torch.addcmul(_per_channel(centre), clips, gradients).sum((1, 3)).mul_(invstd)
        # dx = scale · (dy − mean(dy) − x̂ · mean(dy · x̂)): scale · dy, and an affine map of x
        scale_share = scale * -share
        slope = scale_share * invstd * sum_dy_xhat
        offset = torch.addcmul(scale_share * sum_dy, slope, mean, value=-1)
        dx = torch.empty_like(x)
        dclips = _by_group(dx, len(mean))
        torch.addcmul(_per_channel(offset), clips, _per_channel(slope), out=dclips)
        torch.addcmul(dclips, gradients, _per_channel(scale), out=dclips)
        if not ctx.affine:
            return dx, None, None, None, None
        return dx, sum_dy_xhat.sum(0), sum_dy.sum(0), None, None


def _by_group(x: Tensor, groups: int) -> Tensor:
    """The view `[groups, clips, channels, positions]` of a dense x."""
    return x.unflatten(0, (groups, -1)).flatten(3)


def _per_channel(values: Tensor) -> Tensor:
    """`[groups, channels]` in a shape that broadcasts against `_by_group`."""
    return values[:, None, :, None]


def _fold(x: Tensor, groups: int) -> int:
    """How many neighbouring positions to take as channels of their own, so that few channels fill a CPU's registers.

    On two cores torch's channels_last kernels take 5 to 9 ns a value for 8 channels, and 0.6 for 32 (bf16, both ways).
    """
    channels, values = x.shape[1], x.numel() // groups
    layout = x.is_contiguous(memory_format=torch.channels_last)
    if x.device.type != "cpu" or not layout or channels >= 16 or values < 2**14:
        return 1  # nothing gained
    return math.gcd(32 // channels, values // channels)


def _parts(x: Tensor, groups: int, fold: int) -> Sequence[Tensor]:
    """Views of the groups of x: `[n / groups, channels, t · h, w]`, or `[1, fold · channels, positions / fold, 1]`."""
    if fold == 1:
        return x.chunk(groups)
    return x.movedim(1, -1).view(groups, 1, -1, 1, fold * x.shape[1]).movedim(-1, 2).unbind()


def _folded(fold: int, *maps: Any) -> list[Any]:
    """Values per channel `[…, channels]` or None, once for each of the positions that are folded into channels."""
    return [t if t is None or fold == 1 else t.repeat(*[1] * (t.dim() - 1), fold) for t in maps]


def _ranks(process_group: dist.ProcessGroup | None) -> int:
    return 1 if process_group is None else dist.get_world_size(process_group)


class _MergedNormalise(torch.autograd.Function):
    """Groups whose statistics are merged from parts: those of several ranks, and of positions folded into channels.

    One collective forward and one backward where there is a process group. Returns the output for this rank's part,
    and the whole groups' means and unbiased variances `[groups, channels]`.
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
        # The kernel's precision is that of the running statistics it is given; momentum 0 leaves them as they are.
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
        scaled, sums = [], []  # dy · scale; of dy·x̂ and of dy
        unused = mean.new_empty(0)  # statistics of this very batch, for which CUDA's kernels insist on a tensor
        for x_i, dy_i, mean_i, var_i in zip(x_parts, dy_parts, mean_f, var_f, strict=True):
            gradient, *both = aten.native_batch_norm_backward.default(
                dy_i, x_i, gain_f, mean_i, var_i, unused, unused, False, ctx.eps, (True, True, True)
            )
            scaled.append(gradient)
            sums.append(torch.stack(both))
        own = torch.stack(sums, 1).unflatten(2, (fold, -1)).sum(2)
        whole = own.clone()
        if ctx.process_group is not None:
            dist.all_reduce(whole, group=ctx.process_group)
        # dx = scale · (dy − x̂ · mean(dy·x̂) − mean(dy)): an affine map of dy and one of x.
        maps = _folded(fold, *(-(var + ctx.eps).rsqrt() * gain * whole / size).to(mean.dtype))
        dx = torch.empty_like(x)
        for dx_i, x_i, scaled_i, mean_i, var_i, slope, offset in zip(
            _parts(dx, groups, fold), x_parts, scaled, mean_f, var_f, *maps, strict=True
        ):
            _affine(x_i, mean_i, var_i, ctx.eps, slope, offset, out=dx_i).add_(scaled_i)
        dweight, dbias = own.sum(1) if weight is not None else (None, None)
        return dx, dweight, dbias, None, None, None, None


def _merge(
    mean: Tensor, var: Tensor, size: int, process_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Means, biased variances and sizes of groups from those of their ranks' parts, all float64 `[groups, channels]`.

    Sizes are numbers of values per channel. Variances merge around the common mean (Chan, Golub and LeVeque 1979).
    """
    mine = torch.stack((mean, var, torch.full_like(mean, size)))
    if process_group is None:
        return mine.unbind()  # type: ignore[return-value]
    ranks = dist.get_world_size(process_group)
    gathered = mine.new_empty(ranks * mine.numel())
    dist.all_gather_into_tensor(gathered, mine.flatten(), group=process_group)
    means, variances, sizes = gathered.view(ranks, *mine.shape).unbind(1)
    total = sizes.sum(0)
    mean = (sizes * means).sum(0) / total
    var = (sizes * (variances + (means - mean).square())).sum(0) / total
    return mean, var, total


def _affine(
    x: Tensor, mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None, out: Tensor
) -> Tensor:
    """(x − mean) / √(var + eps) · weight + bias in one pass, from x to `out` of the same dtype and memory format."""
    # CUDA's kernels fill these two, so that they must not share memory
    save_mean, save_invstd = mean.new_empty(0), mean.new_empty(0)
    return aten.native_batch_norm.out(
        x, weight, bias, mean, var, False, 0.0, eps, out=out, save_mean=save_mean, save_invstd=save_invstd
    )[0]
