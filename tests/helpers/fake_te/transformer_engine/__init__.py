"""Stands in for Transformer Engine 2.9 on machines without CUDA: the interface that megatron-core 0.16.1's wrappers use.

Megatron's wrappers around it are the real ones. Products are exact instead of FP8, but shapes are checked as Transformer Engine
checks them, and every module notes the recipe that it ran under. It shows that a model is put together right: names, shapes,
cuts, contexts, recomputation, checkpoints. It shows nothing about FP8's numbers.
"""

import contextlib
import pickle
import sys
import types

import torch
import torch.nn.functional as F

__version__ = "2.9.0"
LOG = []  # (kind of module, recipe or None, is it computed again) of every product
UPDATES = []  # groups that delayed scaling's scales were reduced over, as contexts ended
_state = types.SimpleNamespace(recipe=None, depth=0, again=False)


def _module(name, **content):
    module = sys.modules[f"{__name__}.{name}"] = types.ModuleType(f"{__name__}.{name}")
    vars(module).update(content)
    parent, _, last = f"{__name__}.{name}".rpartition(".")
    setattr(sys.modules[parent], last, module)
    return module


class Recipe:
    def __init__(self, **settings):
        vars(self).update(settings)

    @classmethod
    def delayed(cls):
        return issubclass(cls, DelayedScaling)

    @classmethod
    def mxfp8(cls):
        return issubclass(cls, MXFP8BlockScaling)


class DelayedScaling(Recipe):
    pass


class Float8CurrentScaling(Recipe):
    pass


class Float8BlockScaling(Recipe):
    pass


class MXFP8BlockScaling(Recipe):
    pass


class NVFP4BlockScaling(Recipe):
    pass


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled():
        return _state.recipe is not None

    @staticmethod
    def get_fp8_recipe():
        return _state.recipe


@contextlib.contextmanager
def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None, _graph=False):
    before = _state.recipe
    _state.recipe, _state.depth = fp8_recipe if enabled else None, _state.depth + 1
    try:
        yield
    finally:
        ended = _state.recipe
        _state.recipe, _state.depth = before, _state.depth - 1
        if _state.depth == 0 and ended is not None and ended.delayed() and torch.is_grad_enabled():
            UPDATES.append(fp8_group)


class _Checkpoint(torch.autograd.Function):
    """Reentrant, as Transformer Engine's: the recipe of the first pass is in force in the second."""

    @staticmethod
    def forward(ctx, function, *args):
        ctx.function, ctx.args, ctx.recipe = function, args, _state.recipe
        with torch.no_grad():
            return function(*args)

    @staticmethod
    def backward(ctx, *grads):
        inputs = [arg.detach().requires_grad_(arg.requires_grad) for arg in ctx.args]
        _state.again = True
        try:
            with torch.enable_grad(), fp8_autocast(ctx.recipe is not None, fp8_recipe=ctx.recipe):
                output = ctx.function(*inputs)
        finally:
            _state.again = False
        outputs = output if isinstance(output, tuple) else (output,)
        kept = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if torch.is_tensor(out) and out.requires_grad]
        torch.autograd.backward([out for out, _ in kept], [grad for _, grad in kept])
        return (None, *(value.grad for value in inputs))


def checkpoint(function, *args, distribute_saved_activations=False, get_rng_state_tracker=None, tp_group=None, **kwargs):
    assert not kwargs
    return _Checkpoint.apply(function, *args)


def _check_shapes(rows, weights, gathered_from=None):
    """Transformer Engine's assertions on an FP8 product (`assert_dim_for_fp8_exec`, `is_quantizable`)."""
    if _state.recipe is None:
        return
    align = 32 if _state.recipe.mxfp8() else 16
    assert rows % 8 == 0, f"{rows} tokens"
    assert rows % align == 0, f"{rows} tokens are the inner side of a weight gradient's product: not a multiple of {align}"
    for weight in weights:
        assert all(side % align == 0 for side in weight.shape), f"weight {tuple(weight.shape)}: not multiples of {align}"
    if gathered_from is not None and not isinstance(_state.recipe, DelayedScaling | Float8CurrentScaling):
        block = 32 if _state.recipe.mxfp8() else 128
        assert all(side % block == 0 for side in gathered_from), f"{tuple(gathered_from)} is gathered in blocks of {block}"


class _Base(torch.nn.Module):
    def _setup(
        self, weights, *, out_features, in_features, parallel_mode, tp_group, tp_size, sequence_parallel, params_dtype, device
    ):
        self.tp_group, self.tp_size, self.parallel_mode = tp_group, tp_size, parallel_mode
        self.in_features, self.out_features = in_features, out_features
        if parallel_mode == "column":
            self.out_features //= tp_size
        elif parallel_mode == "row":
            self.in_features //= tp_size
        self.sequence_parallel = tp_size > 1 and sequence_parallel
        self.fp8_meta = {"fp8_checkpoint": False, "recipe": None}
        self.fp8 = self.fp8_calibration = False
        for name in weights:
            weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, dtype=params_dtype, device=device))
            weight.tensor_model_parallel, weight.partition_stride = True, 1
            weight.partition_dim = 1 if parallel_mode == "row" else 0
            self.register_parameter(name, weight)

    def _note(self):
        LOG.append((type(self).__name__, None if _state.recipe is None else type(_state.recipe).__name__, _state.again))
        self.fp8 = self.fp8_meta["fp8_checkpoint"] = _state.recipe is not None
        if self.fp8:
            self.fp8_meta |= {"recipe": _state.recipe, "scaling_fwd": "its own history"}

    def init_fp8_metadata(self, num_gemms=1):
        pass

    def get_extra_state(self):
        if not (self.fp8_meta["fp8_checkpoint"] or self.fp8):
            return torch.empty(0, dtype=torch.uint8)
        recipe, gemms = self.fp8_meta["recipe"], getattr(self, "num_gemms", 1)
        state = {"recipe": recipe, "extra_fp8_variables": {"num_gemms": gemms}}
        if recipe.delayed():  # what each product has seen, told apart by a number
            for way, tensors in (("fwd", 3), ("bwd", 2)):
                seen = torch.arange(gemms, dtype=torch.float32)
                state[f"scale_{way}"] = seen.repeat(tensors)
                state[f"amax_history_{way}"] = seen.repeat(recipe.amax_history_len, tensors)
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)

    def set_extra_state(self, state):
        self.loaded_extra_state = None if state is None or state.numel() == 0 else pickle.loads(state.numpy().tobytes())

    def _multiply(self, x, weight, local_shape):
        from megatron.core.tensor_parallel import mappings

        if self.parallel_mode == "column" and self.tp_size > 1:
            if self.sequence_parallel:
                x = mappings.gather_from_sequence_parallel_region(x, group=self.tp_group)
            else:
                x = mappings.copy_to_tensor_model_parallel_region(x, group=self.tp_group)
        gathered = local_shape if self.sequence_parallel and self.parallel_mode == "column" else None
        _check_shapes(x.shape[:-1].numel(), [weight], None if gathered is None else (gathered[:-1].numel(), gathered[-1]))
        out = F.linear(x, weight)
        if self.parallel_mode == "row" and self.tp_size > 1:
            if self.sequence_parallel:
                return mappings.reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
            return mappings.reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        return out


class Linear(_Base):
    def __init__(
        self,
        in_features,
        out_features,
        *,
        sequence_parallel,
        tp_group,
        tp_size,
        parallel_mode,
        bias,
        return_bias,
        params_dtype,
        device,
        fuse_wgrad_accumulation,
        get_rng_state_tracker,
        init_method,
        rng_tracker_name,
    ):
        super().__init__()
        assert not bias and not return_bias and not fuse_wgrad_accumulation
        self.use_bias, self.save_original_input = False, False
        self._setup(
            ["weight"],
            out_features=out_features,
            in_features=in_features,
            parallel_mode=parallel_mode,
            tp_group=tp_group,
            tp_size=tp_size,
            sequence_parallel=sequence_parallel,
            params_dtype=params_dtype,
            device=device,
        )

    def forward(self, x, is_first_microbatch=None):
        self._note()
        return self._multiply(x, self.weight, x.shape)


class LayerNormLinear(_Base):
    def __init__(
        self,
        in_features,
        out_features,
        *,
        eps,
        normalization,
        return_layernorm_output,
        zero_centered_gamma,
        sequence_parallel,
        tp_group,
        tp_size,
        parallel_mode,
        bias,
        return_bias,
        params_dtype,
        device,
        fuse_wgrad_accumulation,
        get_rng_state_tracker,
        init_method,
    ):
        super().__init__()
        assert normalization == "RMSNorm" and not (bias or return_bias or return_layernorm_output or zero_centered_gamma)
        self.use_bias, self.eps = False, eps
        self._setup(
            ["weight"],
            out_features=out_features,
            in_features=in_features,
            parallel_mode=parallel_mode,
            tp_group=tp_group,
            tp_size=tp_size,
            sequence_parallel=sequence_parallel,
            params_dtype=params_dtype,
            device=device,
        )
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, dtype=params_dtype, device=device))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel

    def forward(self, x, is_first_microbatch=None):
        self._note()
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self._multiply((normed * self.layer_norm_weight.float()).to(x.dtype), self.weight, x.shape)


class GroupedLinear(_Base):
    def __init__(
        self,
        num_gemms,
        in_features,
        out_features,
        *,
        sequence_parallel,
        tp_group,
        tp_size,
        parallel_mode,
        bias,
        return_bias,
        params_dtype,
        device,
        fuse_wgrad_accumulation,
        get_rng_state_tracker,
        init_method,
        rng_tracker_name,
        ub_name,
    ):
        super().__init__()
        assert not bias and not return_bias
        self.num_gemms, self.use_bias = num_gemms, False
        names = [f"weight{index}" for index in range(num_gemms)]
        self._setup(
            names,
            out_features=out_features,
            in_features=in_features,
            parallel_mode=parallel_mode,
            tp_group=tp_group,
            tp_size=tp_size,
            sequence_parallel=sequence_parallel,
            params_dtype=params_dtype,
            device=device,
        )

    def forward(self, x, m_splits, is_first_microbatch=None):
        self._note()
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        for rows in m_splits:
            _check_shapes(rows, weights)
        return torch.cat([F.linear(part, weight) for part, weight in zip(x.split(m_splits), weights, strict=True)])


class Fp8Padding(torch.nn.Module):
    def __init__(self, num_gemms, align_size=None):
        super().__init__()

    def forward(self, x, m_splits):
        align = 32 if _state.recipe is not None and _state.recipe.mxfp8() else 16
        padded = [-(-rows // align) * align for rows in m_splits]
        parts = [F.pad(part, (0, 0, 0, size - len(part))) for part, size in zip(x.split(m_splits), padded, strict=True)]
        return torch.cat(parts), padded


class Fp8Unpadding(torch.nn.Module):
    def __init__(self, num_gemms, align_size=None):
        super().__init__()

    def forward(self, x, m_splits):
        align = 32 if _state.recipe is not None and _state.recipe.mxfp8() else 16
        padded = [-(-rows // align) * align for rows in m_splits]
        return torch.cat([part[:rows] for part, rows in zip(x.split(padded), m_splits, strict=True)])


class _Unused(torch.nn.Module):
    pass


_module("common")
_module(
    "common.recipe",
    Format=types.SimpleNamespace(E4M3="E4M3", HYBRID="HYBRID"),
    DelayedScaling=DelayedScaling,
    Float8CurrentScaling=Float8CurrentScaling,
    Float8BlockScaling=Float8BlockScaling,
    MXFP8BlockScaling=MXFP8BlockScaling,
    NVFP4BlockScaling=NVFP4BlockScaling,
)
_module(
    "pytorch",
    Linear=Linear,
    LayerNormLinear=LayerNormLinear,
    GroupedLinear=GroupedLinear,
    DotProductAttention=_Unused,
    LayerNorm=_Unused,
    RMSNorm=_Unused,
    Fp8Padding=Fp8Padding,
    Fp8Unpadding=Fp8Unpadding,
    fp8_autocast=fp8_autocast,
    fp8_model_init=None,
)
_module("pytorch.ops", Sequential=_Unused, FusibleOperation=_Unused)
_module("pytorch.fp8", FP8GlobalStateManager=FP8GlobalStateManager, fp8_autocast=fp8_autocast)
_module("pytorch.distributed", CudaRNGStatesTracker=object, checkpoint=checkpoint, activation_recompute_forward=None)
_module("pytorch.tensor", QuantizedTensor=type("QuantizedTensor", (), {}))
_module("pytorch.router", fused_compute_score_for_moe_aux_loss=None, fused_moe_aux_loss=None, fused_topk_with_score_function=None)
