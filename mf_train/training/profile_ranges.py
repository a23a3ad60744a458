"""Named ranges around the parts of a model and around methods, put there from outside and taken away again."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.profiler import record_function

from mf_train.model import MemoryFormer
from mf_train.parallel.engine import Engine
from mf_train.training.profile_summary import BACKWARD

FORWARD, EMBEDDING, FINAL_NORM, HEAD = "forward", "embedding", "final norm", "head and loss"
MODEL_PARTS = (FORWARD, EMBEDDING, FINAL_NORM, HEAD, BACKWARD)  # beside those of layers


@contextmanager
def named_parts(engine: Engine) -> Iterator[None]:
    """Within, the passes of `Engine.backward` have a range around every part of the model.

    Passes of other calls, such as validation's, have none: what calls them has a name.
    """
    ranges = _Ranges()
    backward = engine.backward

    def timed_backward(*args: Any, **kwargs: Any) -> Any:
        ranges.wanted = True
        try:
            return backward(*args, **kwargs)
        finally:
            ranges.close()

    with ExitStack() as hooks, _replaced(engine, "backward", timed_backward):
        for handle in _name_model(engine.model, ranges):
            hooks.callback(handle.remove)
        yield


class _Ranges:
    """A stack of open ranges, where they are wanted."""

    def __init__(self) -> None:
        self.wanted = False
        self.open: list[Any] = []

    def enter(self, name: str) -> None:
        if self.wanted:
            self.open.append(record_function(name))
            self.open[-1].__enter__()

    def leave(self) -> None:
        if self.wanted:
            self.open.pop().__exit__(None, None, None)

    def close(self) -> None:
        while self.open:
            self.leave()
        self.wanted = False


def _name_model(model: MemoryFormer, ranges: _Ranges) -> Iterator[Any]:
    """Puts the ranges around the model's parts; yields the hooks' handles."""
    yield from _on_call(model, enter=lambda: ranges.enter(FORWARD))
    yield from _around(model.embedding, EMBEDDING, ranges)
    for block in model.blocks:
        name = f"layer {block.layer}"
        yield from _around(block, name, ranges)
        modules = dict(block.named_children())
        if "hash_attention" in modules:
            hash_, attention = modules.pop("hash_attention"), modules.pop("attention")
            yield from _around_lookups(hash_, attention, name, ranges)
        for part, module in modules.items():
            yield from _around(module, f"{name} / {part}", ranges)
    yield from _around(model.final_norm, FINAL_NORM, ranges)

    def end_forward() -> None:
        ranges.leave()
        ranges.leave()
        ranges.enter(BACKWARD)

    # the losses are computed between the head's logits and the end of the model's forward pass
    yield from _on_call(model.head, enter=lambda: ranges.enter(HEAD))
    yield from _on_call(model, leave=end_forward)


def _around_lookups(hash_: nn.Module, attention: nn.Module, layer: str, ranges: _Ranges) -> Iterator[Any]:
    """Around hash and attention, and around what lies between them: the lookup of query, key and value is one call,
    and of no module.
    """

    def hashed() -> None:
        ranges.leave()
        ranges.enter(f"{layer} / lookup query key value")

    def looked_up() -> None:
        ranges.leave()
        ranges.enter(f"{layer} / attention")

    yield from _on_call(hash_, enter=lambda: ranges.enter(f"{layer} / hash_attention"), leave=hashed)
    yield from _on_call(attention, enter=looked_up, leave=ranges.leave)


def _around(module: nn.Module, name: str, ranges: _Ranges) -> Iterator[Any]:
    return _on_call(module, enter=lambda: ranges.enter(name), leave=ranges.leave)


def _on_call(
    module: nn.Module, *, enter: Callable[[], None] | None = None, leave: Callable[[], None] | None = None
) -> Iterator[Any]:
    """Calls these before and after a module's forward pass, outside of what other hooks of it do."""
    if enter is not None:
        before = enter
        yield module.register_forward_pre_hook(lambda *_: before(), prepend=True)
    if leave is not None:
        after = leave
        # also after a pass that ends early: a recomputation (torch.utils.checkpoint) stops when it has all it needs
        yield module.register_forward_hook(lambda *_: after(), always_call=True)


@contextmanager
def named_method(owner: Any, method: str, name: str) -> Iterator[None]:
    """Within, a method's time has a range of this name around it."""
    plain = getattr(owner, method)

    def timed(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return plain(*args, **kwargs)

    with _replaced(owner, method, timed):
        yield


@contextmanager
def _replaced(owner: Any, method: str, function: Callable[..., Any]) -> Iterator[None]:
    own = vars(owner).get(method)  # mostly the method is its class's, and the function is put in front of it
    setattr(owner, method, function)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, method)
        else:
            setattr(owner, method, own)
