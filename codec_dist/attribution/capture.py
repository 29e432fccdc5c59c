"""Watching and changing hidden tensors of a model that stays exactly as it was found.

Three contexts, from the plainest to the most able; each undoes what it did, also after an error:

- :func:`borrowed` puts a model into the state in which it is explained;
- :func:`edited` lets functions replace hidden tensors in each forward pass (ablation, steering, sharing
  the layers before a chosen one between many conditions);
- :class:`Capture` runs forward passes and hands out the hidden tensors, ready for ``torch.autograd.grad``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from codec_dist.attribution.errors import AttributionError
from codec_dist.models import LayerKey, model_call

Edit = Callable[[Tensor], Tensor]


class Captured(NamedTuple):
    """One forward pass."""

    output: Any
    """What the model returned."""
    hidden: dict[LayerKey, Tensor]
    """Hidden tensor of each site, in the order in which the pass reached them."""


@contextmanager
def borrowed(model: nn.Module, *, keep_inplace: bool = False) -> Iterator[None]:
    """While open, ``model`` is in evaluation mode, its parameters are frozen, and no module works in place.

    In-place modules would overwrite hidden tensors that are being watched; ``keep_inplace`` leaves them to
    someone who looks out for that. On exit the mode of every module, the ``requires_grad`` flag of every
    parameter and every ``inplace`` flag are as before.
    """
    modules = list(model.modules())
    training = [module for module in modules if module.training]
    inplace = [module for module in modules if vars(module).get("inplace") is True and not keep_inplace]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for module in training:
            module.training = False
        for module in inplace:
            module.inplace = False  # type: ignore[assignment]
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for module in inplace:
            module.inplace = True  # type: ignore[assignment]
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def edited(model: nn.Module, edits: Mapping[LayerKey, Edit]) -> Iterator[None]:
    """While open, every forward pass of ``model`` replaces hidden tensors.

    Args:
        model: the model; only hooks are added, and removed on exit. Use within :func:`borrowed` where the
            model may be in training mode.
        edits: for each site (reductions are ignored) a function from the hidden tensor, for example
            [batch, channels, height, width], to what takes its place. It must not change its argument; it
            may return another batch size, such as the batch repeated with a mask for each condition. A
            module that is called several times calls it each time.

    Raises:
        AttributionError: the model has no such module, or, in the forward pass, the module's output or
            input does not hold exactly one floating-point tensor.
    """
    with ExitStack() as stack:
        for key, edit in edits.items():
            try:
                module = model.get_submodule(key.module)
            except AttributeError as error:
                raise AttributionError(f"layer {key}: the model has no module {key.module!r}") from error
            with model_call(f"layer {key} was to be watched"):
                if key.at_input:
                    handle = module.register_forward_pre_hook(partial(_edit_input, key, edit))
                else:
                    handle = module.register_forward_hook(partial(_edit_output, key, edit))
            stack.callback(handle.remove)
        yield


class Capture:
    """Forward passes of a borrowed model whose hidden tensors are handed out.

    Use as a context manager, as often as wanted::

        with Capture(model, layers) as capture:
            output, hidden = capture(images)
            gradients = torch.autograd.grad(output.sum(), list(hidden.values()))

    Every hidden tensor is a node of its own in the graph: gradients with respect to it follow only the
    paths through that module's output (or, ``@input``, into that module). Where ``images`` need no
    gradient the graph begins at the chosen layers that are reached first, so that nothing is stored for
    the layers before. Under ``torch.no_grad`` hidden tensors are plain values. Do not use it under
    ``torch.inference_mode``.

    Args:
        model: the model.
        layers: whose hidden tensors are handed out (reductions are ignored).
        keep_inplace: let modules that work in place do so where that overwrites nothing watched.
    """

    def __init__(self, model: nn.Module, layers: Iterable[LayerKey], *, keep_inplace: bool = True) -> None:
        self.model, self._keep_inplace = model, keep_inplace
        self.sites = tuple(dict.fromkeys(key.site for key in layers))
        self._hidden: dict[LayerKey, Tensor] = {}
        self._handed: dict[LayerKey, tuple[Tensor, int]] = {}
        # Sites whose tensor nothing downstream overwrites; until that is known they pass on a copy.
        self._kept_intact: set[LayerKey] = set()
        # Whether the model leaves its input as it is; until that is known it gets a copy.
        self._input_intact = False
        self._stack: ExitStack | None = None

    def __enter__(self) -> "Capture":
        if self._stack is not None:
            raise RuntimeError("this capture is open already: a capture cannot be used within itself")
        with ExitStack() as stack:
            # Fresh memory costs more than a ReLU.
            stack.enter_context(borrowed(self.model, keep_inplace=self._keep_inplace))
            stack.enter_context(edited(self.model, {site: partial(self._keep, site) for site in self.sites}))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forget()
        if self._stack is not None:
            self._stack.close()
            self._stack = None

    def __call__(self, images: Tensor) -> Captured:
        """Run the model.

        Raises:
            AttributionError: a layer was not reached, or more than once, or its module's output is not one
                floating-point tensor.
        """
        self._forget()
        try:
            output = self._run(images)
            missing = [site for site in self.sites if site not in self._hidden]
            if missing:
                raise AttributionError(
                    f"layer {missing[0]} was not reached: the forward pass never calls this module; choose another"
                )
            self._learn_what_is_overwritten()
            return Captured(output, self._hidden)
        finally:
            self._forget()

    def _run(self, images: Tensor) -> Any:
        """The model's output; errors of its own code are one line, and ``images`` stay as they are."""
        given = images if self._input_intact else images.clone()
        version = given._version
        with model_call(f"it computed images of {list(images.shape)}"):
            output = self.model(given)
        if given._version == version:
            self._input_intact = True
        elif self._input_intact:
            raise AttributionError("the model overwrites its input in place in some forward passes only")
        return output

    def _keep(self, site: LayerKey, hidden: Tensor) -> Tensor:
        if site in self._hidden:
            raise AttributionError(
                f"layer {site} is called more than once in one forward pass, so its hidden tensor is ambiguous: "
                "choose a module that is called once"
            )
        if hidden.requires_grad:
            kept = same_strides(hidden)
        elif torch.is_grad_enabled():
            kept = hidden.detach().requires_grad_()
        else:
            kept = hidden
        handed = kept if site in self._kept_intact else kept.clone()
        self._hidden[site] = kept
        self._handed[site] = handed, handed._version
        return handed

    def _learn_what_is_overwritten(self) -> None:
        # By in-place modules such as ReLUs, or functions such as `out += identity`.
        for site, (handed, version) in self._handed.items():
            if handed._version == version:
                self._kept_intact.add(site)
            elif site in self._kept_intact:
                raise AttributionError(f"layer {site} is overwritten in place in some forward passes only")

    def _forget(self) -> None:
        self._hidden, self._handed = {}, {}


def same_strides(tensor: Tensor) -> Tensor:
    """The tensor as a node of its own in the graph, laid out in memory as it is.

    ``view_as`` would give a batch of one image in channels_last other strides, of which torch's backward passes of
    BatchNorm and convolutions compute wrong gradients.
    """
    aliased: Tensor = torch.ops.aten.alias(tensor)
    return aliased


def _edit_output(key: LayerKey, edit: Edit, module: nn.Module, inputs: Any, output: Any) -> Any:
    return _edit_only_tensor(key, edit, output)


def _edit_input(key: LayerKey, edit: Edit, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    changed: tuple[Any, ...] = _edit_only_tensor(key, edit, inputs)
    return changed


def _edit_only_tensor(key: LayerKey, edit: Edit, value: Any) -> Any:
    """Edit ``value``, or the one tensor in it if it is a tuple or list, and keep its form."""
    if isinstance(value, tuple | list):
        places = [place for place, item in enumerate(value) if isinstance(item, Tensor)]
        if len(places) != 1:
            raise AttributionError(
                f"layer {key}: its module {'takes' if key.at_input else 'returns'} a {type(value).__name__} with "
                f"{len(places)} tensors where one is needed: choose a module inside it or after it"
            )
        changed = list(value)
        changed[places[0]] = edit(_floating(key, value[places[0]]))
        return _like(value, changed)
    if not isinstance(value, Tensor):
        raise AttributionError(
            f"layer {key}: its module returns a {type(value).__name__}, not a tensor: choose a module inside it"
        )
    return edit(_floating(key, value))


def _floating(key: LayerKey, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise AttributionError(f"layer {key} holds {tensor.dtype}: contributions need floating-point numbers")
    return tensor


def _like(value: tuple[Any, ...] | list[Any], items: Sequence[Any]) -> Any:
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


# ---- Which layers every path from input to output passes through


def find_cuts(capture: Capture, image: Float[Tensor, "one ..."]) -> dict[LayerKey, bool]:
    """Whether each captured site is a cut: with h replaced by a detached leaf, T has no gradient to x.

    One forward pass serves all sites: in its autograd graph, h becomes a leaf by not going past its node.
    """
    start = same_strides(image.detach().requires_grad_())
    output, hidden = capture(start)
    end = checked_output(output, image.shape[0]).grad_fn
    return {site: not _connected(end, start.grad_fn, without=tensor.grad_fn) for site, tensor in hidden.items()}


def _connected(end: torch.autograd.graph.Node | None, start: object, without: object) -> bool:
    """Whether a path of the autograd graph leads from ``end`` to ``start``, other than through ``without``."""
    remaining, seen = [end], {end}
    while remaining:
        node = remaining.pop()
        if node is None or node is without:
            continue
        if node is start:
            return True
        following = {parent for parent, _ in node.next_functions} - seen
        seen |= following
        remaining.extend(following)
    return False


# ---- The form that a model's output must have


def checked_output(output: object, batch: int) -> Float[Tensor, "batch outputs"]:
    """The output if it has the form [batch, outputs].

    Raises:
        AttributionError: it has another form.
    """
    if not isinstance(output, Tensor):
        raise AttributionError(f"the model returns a {type(output).__name__}: wrap it to return [batch, outputs]")
    if output.ndim != 2 or output.shape[0] != batch:
        raise AttributionError(
            f"the model's output is {list(output.shape)} for {batch} images: targets need [batch, outputs]"
        )
    return output


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return tensor.float() if tensor.dtype in HALF else tensor


HALF = (torch.float16, torch.bfloat16)
