"""Your own network as a model: any path, any prediction, with or without guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from oss_ext import arguments
from oss_ext.models.base import Model, check_output, hash_of
from oss_ext.models.custom_identity import Identity
from oss_ext.noise import FLOW, PREDICTIONS, Path, VEPath, velocity_of

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


class CallableModel(Model):
    """``network(x', t', sample) -> output`` on its own path; see ``from_callable``."""

    def __init__(
        self,
        network: Network,
        name: str,
        shape: Sequence[int],
        path: Path,
        predicts: str,
        sigma_data: float,
        unconditional: Network | None,
        guidance: float,
        learned_variance: bool,
    ) -> None:
        self._network, self.name, self.shape = network, name, tuple(shape)
        self.path, self._predicts, self._sigma_data = path, predicts, sigma_data
        self._unconditional, self._guidance = unconditional, guidance
        self._learned_variance = learned_variance
        self._identities = [Identity(fn) for fn in (network, unconditional) if fn is not None]

    def __call__(self, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        alpha, beta = self.path.alpha_beta(t)
        scale = alpha + beta
        if self._predicts == "edm":  # c_in
            scale = scale / (beta**2 + self._sigma_data**2).sqrt()
        rows = [-1] + [1] * (x.dim() - 1)
        inputs = x * scale.view(rows).to(x.dtype)
        time = self.path.model_times(t)
        if self._unconditional is None or self._guidance == 1:
            output = self._call(self._network, inputs, time, sample)
        else:  # a network may write to what it is given, and again to what it gave
            output = self._call(self._network, inputs.clone(), time.clone(), sample).clone()
            null = self._call(self._unconditional, inputs, time, sample)
            output = null + self._guidance * (output - null)
        state = x * (alpha + beta).view(rows).to(x.dtype)
        return velocity_of(self._predicts, output, state, alpha, beta, self._sigma_data)

    def _call(self, network: Network, x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        try:
            output = network(x, t, sample)
        except (RuntimeError, TypeError) as error:
            given = ", ".join(f"{v.dtype} {tuple(v.shape)}" for v in (x, t, sample))
            error.add_note(f"in {self.name!r}, which was given {given}")
            raise
        doubled = (len(x), 2 * x.shape[1], *x.shape[2:])
        twice = isinstance(output, Tensor) and output.shape == doubled
        if twice and self._learned_variance:
            return output[:, : x.shape[1]]
        hint = "; learned_variance=True takes the first half of the channels" if twice else ""
        check_output(self.name, output, x, "output", hint)
        return output

    def networks(self) -> dict[str, nn.Module]:
        both = {"": self._network, "unconditional": self._unconditional}
        return {name: fn for name, fn in both.items() if isinstance(fn, nn.Module)}

    def enclosed(self) -> list[nn.Module]:
        own = self.networks().values()
        return [module for module in self._modules() if module not in own]

    def _modules(self) -> list[nn.Module]:
        return [module for identity in self._identities for module in identity.modules]

    def fingerprint(self) -> str:
        settings = [self.path, self._predicts, self._sigma_data, self._guidance]
        facts = [fact for identity in self._identities for fact in identity.facts]
        weights = [value for module in self._modules() for value in module.state_dict().values()]
        return hash_of([self.name, self.shape, *settings, *facts, *weights])


def from_callable(
    network: Network,
    shape: Sequence[int],
    *,
    path: Path | None = None,
    predicts: str = "velocity",
    sigma_data: float = 0.5,
    unconditional: Network | None = None,
    guidance: float = 1.0,
    learned_variance: bool = False,
    name: str = "custom",
    data_range: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    one_time_per_call: bool = False,
    fixed_batch: int | None = None,
) -> CallableModel:
    """Wrap ``network(x [R, *shape], t [R], sample [R]) -> output [R, *shape]``.

    The network is given its own states ``alpha x0 + beta eps`` and its own times, float64
    (timesteps, sigmas, ...), as ``path`` has them; ``sample`` says which item of your conditioning
    each row belongs to.

    Args:
        network: the network; guidance that it takes as an input is its own affair.
        shape: dims of a sample.
        path: a path of ``oss_ext.noise``; None: flow matching, time from 0 (clean) to 1 (noise).
        predicts: what comes out, a name in ``oss_ext.noise.PREDICTIONS``: ``velocity``
            (``eps - x0``), ``reverse_velocity``, ``eps``, ``x0``, ``v``, or ``edm``: the bare
            network of EDM's preconditioning, which is also given ``c_in x'``.
        sigma_data: standard deviation of the data, for ``edm``.
        unconditional: the same network without its condition, for classifier-free guidance:
            ``output = null + guidance (conditional - null)``.
        guidance: the scale of it.
        learned_variance: the output has twice the channels, of which the first half count.
        name, data_range, dtype, device, one_time_per_call, fixed_batch: as ``Model`` has them.

    The fingerprint covers all weights of networks that are ``torch.nn.Module``. Of a function it
    covers the modules, numbers and strings that it encloses, has as defaults or finds among the
    globals of its file; tensors that it holds, conditions for one, it does not: let ``name`` tell
    models apart where only these differ.

    Raises:
        ValueError: what cannot be called; a bad name, shape, dtype, device, data range or batch, an
            unknown prediction, guidance without ``unconditional``, ``edm`` off VE paths.
    """
    called: dict[str, object] = {"network": network}
    called |= {} if unconditional is None else {"unconditional": unconditional}
    for role, given in called.items():
        if not callable(given):
            raise ValueError(f"{role}: expected a network(x, t, sample), got {given!r:.100}")
    path = FLOW if path is None else path
    if not isinstance(path, Path):
        raise ValueError(f"path: expected a path of oss_ext.noise, got {path!r}")
    if not isinstance(name, str) or not name or not set(name).isdisjoint("/\\\0"):
        raise ValueError(f"name: expected a name for files, without slashes, got {name!r}")
    dims = tuple(shape) if isinstance(shape, Sequence) else ()
    if not dims:
        raise ValueError(f"shape: expected the dims of a sample, whole numbers, got {shape!r}")
    dims = tuple(arguments.whole_number("shape", size) for size in dims)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating-point torch.dtype, got {dtype!r}")
    if fixed_batch is not None:
        arguments.whole_number("fixed_batch", fixed_batch)
    if data_range is not None:
        arguments.number("data_range", data_range, positive=True)
    arguments.one_of("predicts", predicts, PREDICTIONS)
    if predicts == "edm" and not isinstance(path, VEPath):
        raise ValueError(f"predicts: 'edm' belongs to a VEPath, got {path}")
    sigma_data = arguments.number("sigma_data", sigma_data, positive=True)
    guidance = arguments.number("guidance", guidance)
    if unconditional is None and guidance != 1.0:
        raise ValueError(f"guidance: expected 1 without `unconditional`, got {guidance!r}")
    model = CallableModel(
        network, name, shape, path, predicts, sigma_data, unconditional, guidance, learned_variance
    )
    model.data_range, model.dtype = data_range, dtype
    model.device = arguments.device("device", device)
    model.one_time_per_call, model.fixed_batch = one_time_per_call, fixed_batch
    return model
