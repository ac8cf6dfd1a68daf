"""Base class of the provider: Megatron-Bridge's mixin where it can be imported, else the part of it that we use."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

Hook = Callable[[list[Any]], Any]


def compose_hooks(hooks: list[Hook]) -> Hook:
    """One hook that runs several in order. A hook that returns None has changed the models in place."""

    def composed(models: list[Any]) -> list[Any]:
        for hook in hooks:
            models = run_hook(hook, models)
        return models

    return composed


def run_hook(hook: Hook, models: list[Any]) -> list[Any]:
    """What the hook returns; the same models where it returns None."""
    result = hook(models)
    return models if result is None else result


class _HookRegistry:
    """Registration of hooks as in Megatron-Bridge's ModelProviderMixin."""

    def register_pre_wrap_hook(self, hook: Hook, prepend: bool = False) -> None:
        """Add a hook that sees the models before they are wrapped."""
        self._register("_pre_wrap_hooks", hook, prepend)

    def register_post_wrap_hook(self, hook: Hook, prepend: bool = False) -> None:
        """Add a hook that sees the wrapped models."""
        self._register("_post_wrap_hooks", hook, prepend)

    @property
    def pre_wrap_hook(self) -> Hook | None:
        """All registered pre-wrap hooks as one, or None."""
        hooks = getattr(self, "_pre_wrap_hooks", None)
        return compose_hooks(hooks) if hooks else None

    @property
    def post_wrap_hook(self) -> Hook | None:
        """All registered post-wrap hooks as one, or None."""
        hooks = getattr(self, "_post_wrap_hooks", None)
        return compose_hooks(hooks) if hooks else None

    def _register(self, attribute: str, hook: Hook, prepend: bool) -> None:
        hooks = self.__dict__.setdefault(attribute, [])
        hooks.insert(0 if prepend else len(hooks), hook)


def _base() -> type:
    try:
        from megatron.bridge.models.model_provider import ModelProviderMixin
    except Exception as error:
        # Megatron-Bridge fails in many ways where Transformer Engine or a newer Python is missing.
        logger.debug("Megatron-Bridge cannot be imported (%s); the provider does without it", error)
        return _HookRegistry
    return ModelProviderMixin


ProviderBase: Any = _base()
